"""Last launch of sampling: of each row the block in which its uniform falls, there the token."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.gpu.scores import BLOCK, Draw, finite_peak, load_scores, ordered_key


def choose(
    draw: Draw, uniforms: Tensor, *, is_greedy: bool, is_filtered: bool
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [R] and their log-probs float32 [R], NaN where the row is not sane."""
    vocab_size, num_rows, num_blocks = draw.sizes
    tokens = torch.empty(num_rows, dtype=torch.int64, device=draw.logits.device)
    logps = torch.empty(num_rows, dtype=torch.float32, device=draw.logits.device)
    choose_kernel[(num_rows,)](
        draw.logits,
        draw.scores,
        draw.allowed,
        draw.stats,
        draw.cutoffs,
        uniforms.double(),
        tokens,
        logps,
        draw.logits.stride(0),
        draw.scores.stride(0),
        vocab_size,
        num_rows,
        num_blocks,
        draw.inverse_temperature,
        GREEDY=is_greedy,
        FILTERED=is_filtered,
        SUPPRESS=draw.is_suppressing,
        BLOCK=BLOCK,
        MAX_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=4,
    )
    return tokens, logps


# The launcher makes a constant of a number that is 1, which has no `.to`.
@triton.jit(do_not_specialize=["num_rows"])
def choose_kernel(
    logits,  # [R, V]
    scores,  # [R, V]
    allowed,  # [V] int8
    stats,  # [4, R, J]
    cutoffs,  # [R] int64
    uniforms,  # [R] float64
    tokens,  # [R] int64
    logps,  # [R] float32
    logits_stride,
    scores_stride,
    vocab_size,
    num_rows,
    num_blocks,
    inverse_temperature,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = num_rows.to(tl.int64) * num_blocks
    block_ids = tl.arange(0, MAX_BLOCKS)
    there = block_ids < num_blocks
    place = stats + row * num_blocks + block_ids
    lse = row_log_sum_exp(place, plane, there)

    score_peaks = tl.load(place + 2 * plane, there, other=float("-inf"))
    score_totals = tl.load(place + 3 * plane, there, other=0.0)
    score_peak = tl.max(score_peaks, 0)
    row_scores = scores + row * scores_stride
    offs = tl.arange(0, BLOCK)
    if GREEDY:
        block = tl.min(tl.where(score_peaks == score_peak, block_ids, MAX_BLOCKS - 1), 0)
        column = block * BLOCK + offs
        s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
        local = tl.min(tl.where(s == score_peak, offs, BLOCK - 1), 0)
        sane = tl.sum(score_totals, 0) > 0
    else:
        base = finite_peak(score_peak)
        scale = tl.exp((score_peaks - base) * inverse_temperature)
        masses = score_totals.to(tl.float64) * scale.to(tl.float64)
        level = tl.load(uniforms + row) * tl.sum(masses, 0)
        block, share = find_block(masses, level, block_ids)
        column = block * BLOCK + offs
        s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
        weights = tl.exp((s - base) * inverse_temperature)
        if FILTERED:
            stays = ordered_key(s) >= tl.load(cutoffs + row).to(tl.uint32)
            weights = tl.where(stays, weights, 0.0)
        local = find_column(weights, share, offs)
        sane = tl.sum(masses, 0) > 0
    token = block * BLOCK + local
    sane = sane & (lse == lse) & (tl.abs(score_peak) < float("inf")) & (token < vocab_size)
    token = tl.where(sane, token, 0)
    chosen = tl.load(logits + row * logits_stride + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logps + row, tl.where(sane, chosen - lse, float("nan")))


@triton.jit
def find_block(masses, level, block_ids):
    """The block in which the cumulative mass exceeds `level`, and what share of it is passed."""
    cdf = tl.cumsum(masses, 0)
    # Rounding may take the level to the total: stay at the last block that has any mass.
    last = tl.max(tl.where(masses > 0, block_ids, 0), 0)
    block = tl.minimum(tl.sum((cdf <= level).to(tl.int32), 0), last)
    before = tl.sum(tl.where(block_ids < block, masses, 0.0), 0)
    mass = tl.sum(tl.where(block_ids == block, masses, 0.0), 0)
    return block, (level - before) / tl.where(mass > 0, mass, 1.0)


@triton.jit
def find_column(weights, share, offs):
    """The column in which the cumulative weight exceeds `share` of all.

    A share, since the block's float32 sum and the sum of its columns differ in the last bits.
    """
    inner = tl.cumsum(weights.to(tl.float64), 0)
    last = tl.max(tl.where(weights > 0, offs, 0), 0)
    rest = tl.maximum(share * tl.sum(weights.to(tl.float64), 0), 0.0)
    return tl.minimum(tl.sum((inner <= rest).to(tl.int32), 0), last)


@triton.jit
def row_log_sum_exp(place, plane, there):
    """Natural logarithm of the row's sum of exponentials, of the raw logits."""
    peaks = tl.load(place, there, other=float("-inf"))
    totals = tl.load(place + plane, there, other=0.0)
    peak = tl.max(peaks, 0)
    return peak + tl.log(tl.sum(totals * tl.exp(peaks - finite_peak(peak)), 0))
