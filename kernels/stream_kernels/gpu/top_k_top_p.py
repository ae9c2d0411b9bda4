"""Second launch of sampling, with top-k or top-p only: what is not likely enough loses its mass.

A row's cutoff is found digit by digit, 4 bits of the float's ordered integer at a time.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from stream_kernels.gpu.scores import BLOCK, Draw, finite_peak, load_scores, ordered_key

# Digits of 4 bits that tell two numbers of the dtype apart once both are float32.
_DIGITS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}


def keep_likeliest(draw: Draw, top_k: int, top_p: float) -> None:
    """Fill `draw.cutoffs`, and rewrite `draw.stats` to the mass that stays.

    The `top_k` largest stay (0 or the vocabulary: all), then what `top_p` of the mass needs.
    """
    vocab_size, num_rows, num_blocks = draw.sizes
    filter_kernel[(num_rows,)](
        draw.scores,
        draw.allowed,
        draw.stats,
        draw.cutoffs,
        draw.scores.stride(0),
        vocab_size,
        num_rows,
        num_blocks,
        draw.inverse_temperature,
        min(top_k, vocab_size),
        top_p,
        USE_TOP_K=0 < top_k < vocab_size,
        USE_TOP_P=top_p < 1,
        SUPPRESS=draw.is_suppressing,
        DIGITS=_DIGITS[draw.scores.dtype],
        BLOCK=BLOCK,
        MAX_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )


# The launcher makes a constant of a number that is 1, which has no `.to`.
@triton.jit(do_not_specialize=["num_rows"])
def filter_kernel(
    scores,  # [R, V]
    allowed,  # [V] int8
    stats,  # [4, R, J]; the last plane is rewritten to the mass that stays
    cutoffs,  # [R] int64: the least ordered key that stays
    scores_stride,
    vocab_size,
    num_rows,
    num_blocks,
    inverse_temperature,
    top_k,
    top_p,
    USE_TOP_K: tl.constexpr,
    USE_TOP_P: tl.constexpr,
    SUPPRESS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_scores = scores + row * scores_stride
    plane = num_rows.to(tl.int64) * num_blocks
    row_stats = stats + 2 * plane + row * num_blocks
    block_ids = tl.arange(0, MAX_BLOCKS)
    peaks = tl.load(row_stats + block_ids, block_ids < num_blocks, other=float("-inf"))
    peak = finite_peak(tl.max(peaks, 0))

    columns = (row_scores, allowed, vocab_size, peak, inverse_temperature)
    cutoff = tl.zeros([], tl.uint32)
    if USE_TOP_K:
        cutoff = top_k_cutoff(columns, top_k, SUPPRESS, DIGITS, BLOCK)
    if USE_TOP_P:
        cutoff = top_p_cutoff(columns, cutoff, top_p, SUPPRESS, DIGITS, BLOCK)
    tl.store(cutoffs + row, cutoff.to(tl.int64))

    for block in range(0, num_blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
        block_peak = tl.load(row_stats + block)
        weight = tl.exp((s - finite_peak(block_peak)) * inverse_temperature)
        stays = ordered_key(s) >= cutoff
        total = tl.sum(tl.where(stays, weight, 0.0), 0)
        # A NaN has no place in the order: it must reach the sum all the same.
        total = tl.where(tl.sum(weight, 0) >= 0, total, float("nan"))
        tl.store(row_stats + plane + block, total)


@triton.jit
def top_k_cutoff(columns, top_k, SUPPRESS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key with at least `top_k` keys of the row at or above it; columns: next_digit."""
    digit = tl.arange(0, 16)
    above = tl.zeros([], tl.float64)  # keys with higher digits than those chosen so far
    prefix = tl.zeros([], tl.uint32)
    floor = tl.zeros([], tl.uint32)
    for step in range(DIGITS):
        bins = next_digit(columns, floor, prefix, 28 - 4 * step, True, SUPPRESS, BLOCK)
        # bins from this digit up, for each digit
        from_digit = tl.sum(tl.where(digit[None, :] >= digit[:, None], bins[None, :], 0.0), 1)
        chosen = tl.max(tl.where(above + from_digit >= top_k, digit, 0), 0)
        above += tl.sum(tl.where(digit > chosen, bins, 0.0), 0)
        prefix = prefix * 16 + chosen.to(tl.uint32)
    return prefix << (32 - 4 * DIGITS)


@triton.jit
def top_p_cutoff(
    columns, floor, top_p, SUPPRESS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The least key with less than `top_p` of the mass from `floor` up strictly above it."""
    digit = tl.arange(0, 16)
    above = tl.zeros([], tl.float64)
    prefix = tl.zeros([], tl.uint32)
    limit = tl.zeros([], tl.float64)
    for step in range(DIGITS):
        bins = next_digit(columns, floor, prefix, 28 - 4 * step, False, SUPPRESS, BLOCK)
        if step == 0:
            limit = tl.sum(bins, 0) * top_p
        over_digit = tl.sum(tl.where(digit[None, :] > digit[:, None], bins[None, :], 0.0), 1)
        chosen = tl.min(tl.where(above + over_digit < limit, digit, 15), 0)
        above += tl.sum(tl.where(digit > chosen, bins, 0.0), 0)
        prefix = prefix * 16 + chosen.to(tl.uint32)
    return tl.maximum(floor, prefix << (32 - 4 * DIGITS))


@triton.jit
def next_digit(
    columns,
    floor,
    prefix,
    shift,
    COUNT: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weight by the next 4 bits, of the numbers whose higher bits are `prefix`: float64 [16].

    The weight is 1 (COUNT) or the tempered exponential, of numbers whose key is at least `floor`.
    columns: (scores of the row, allowed, V, the row's peak, inverse temperature).
    """
    row_scores, allowed, vocab_size, peak, inverse_temperature = columns
    bins = tl.zeros([16], tl.float64)
    digit = tl.arange(0, 16)
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
        key = ordered_key(s)
        member = (column < vocab_size) & (key >= floor) & (((key >> shift) >> 4) == prefix)
        if COUNT:
            weight = tl.where(member, 1.0, 0.0)
        else:
            weight = tl.where(member, tl.exp((s - peak) * inverse_temperature), 0.0)
        mine = ((key >> shift) & 15)[:, None] == digit[None, :]
        bins += tl.sum(tl.where(mine, weight[:, None], 0.0), 0).to(tl.float64)
    return bins
