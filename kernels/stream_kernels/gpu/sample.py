"""Triton sampling: the logits are read once, then one block of each row again.

`block_stats_kernel` leaves, for each block of columns, its maximum and sum of exponentials, both
of the raw logits (for the log-prob) and of the tempered ones. `choose_kernel`, one program a row,
takes the block in which the row's uniform falls, reads it again and takes the token. Between the
two, `filter_kernel` (only with top-k or top-p) finds each row's cutoff digit by digit, 4 bits of
the float's ordered integer at a time, and takes the filtered mass out of the sums; the logits then
come from L2. No program looks at another row.
Legend: R rows, V vocabulary, J blocks of a row.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.gpu.launch import on_own_device

_BLOCK = 1024
_BLOCKS_A_PROGRAM = 4
# Digits of 4 bits that tell two numbers of the dtype apart once both are float32.
_DIGITS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}


@on_own_device
def sample_cuda(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    suppress: Tensor | None,
    penalized: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`stream_kernels.sample` for CUDA tensors, without waiting: a bad row's log-prob is NaN."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logps = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return tokens, logps
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    scores = logits if penalized is None else penalized
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    allowed = logits  # a pointer that is not read
    if suppress is not None:
        allowed = torch.ones(vocab_size, dtype=torch.int8, device=logits.device)
        allowed.index_fill_(0, suppress, 0)
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    stats = logits.new_empty((4, num_rows, num_blocks), dtype=torch.float32)
    cutoffs = logits.new_empty(num_rows, dtype=torch.int64)
    inverse_temperature = 1.0 / temperature if temperature > 0 else 1.0
    # The scores are the logits: their statistics are then the same and taken once.
    same = penalized is None
    plain = same and suppress is None and temperature in (0, 1)
    block_stats_kernel[(num_rows * triton.cdiv(num_blocks, _BLOCKS_A_PROGRAM),)](
        logits,
        scores,
        allowed,
        stats,
        logits.stride(0),
        scores.stride(0),
        vocab_size,
        num_rows,
        num_blocks,
        inverse_temperature,
        SAME=same,
        PLAIN=plain,
        SUPPRESS=suppress is not None,
        BLOCK=_BLOCK,
        BLOCKS_A_PROGRAM=_BLOCKS_A_PROGRAM,
        num_warps=4,
    )
    filtered = temperature > 0 and (0 < top_k < vocab_size or top_p < 1)
    if filtered:
        filter_kernel[(num_rows,)](
            scores,
            allowed,
            stats,
            cutoffs,
            scores.stride(0),
            vocab_size,
            num_rows,
            num_blocks,
            inverse_temperature,
            min(top_k, vocab_size),
            top_p,
            USE_TOP_K=0 < top_k < vocab_size,
            USE_TOP_P=top_p < 1,
            SUPPRESS=suppress is not None,
            DIGITS=_DIGITS[scores.dtype],
            BLOCK=_BLOCK,
            MAX_BLOCKS=triton.next_power_of_2(num_blocks),
            num_warps=8,
        )
    choose_kernel[(num_rows,)](
        logits,
        scores,
        allowed,
        stats,
        cutoffs,
        uniforms.double(),
        tokens,
        logps,
        logits.stride(0),
        scores.stride(0),
        vocab_size,
        num_rows,
        num_blocks,
        inverse_temperature,
        GREEDY=temperature == 0,
        FILTERED=filtered,
        SUPPRESS=suppress is not None,
        BLOCK=_BLOCK,
        MAX_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=4,
    )
    return tokens, logps


@triton.jit
def load_scores(scores, allowed, row_offs, column, vocab_size, SUPPRESS: tl.constexpr):
    """Float32 scores of some columns; -inf beyond the vocabulary and where suppressed."""
    there = column < vocab_size
    loaded = tl.load(scores + row_offs + column, there, other=float("-inf")).to(tl.float32)
    return forbid(loaded, allowed, column, vocab_size, SUPPRESS)


@triton.jit
def forbid(scores, allowed, column, vocab_size, SUPPRESS: tl.constexpr):
    """The scores with -inf where suppressed."""
    if SUPPRESS:
        may = tl.load(allowed + column, column < vocab_size, other=0)
        scores = tl.where(may != 0, scores, float("-inf"))
    return scores


@triton.jit
def ordered_key(number):
    """The float32's bits as a uint32 that sorts as the float does."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits ^ -2147483648, ~bits).to(tl.uint32, bitcast=True)


@triton.jit
def finite_peak(peak):
    """`peak`, or 0 for a block of -inf alone, whose exponentials must be 0 and not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


# The launcher makes a constant of a number that is 1, which has no `.to`.
@triton.jit(do_not_specialize=["num_rows"])
def block_stats_kernel(
    logits,  # [R, V]
    scores,  # [R, V]
    allowed,  # [V] int8
    stats,  # [4, R, J]: peak and sum of the logits, peak and tempered sum of the scores
    logits_stride,
    scores_stride,
    vocab_size,
    num_rows,
    num_blocks,
    inverse_temperature,
    SAME: tl.constexpr,
    PLAIN: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_A_PROGRAM: tl.constexpr,
):
    programs = tl.cdiv(num_blocks, BLOCKS_A_PROGRAM)
    row = (tl.program_id(0) // programs).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    plane = num_rows.to(tl.int64) * num_blocks
    for step in tl.static_range(BLOCKS_A_PROGRAM):
        block = tl.program_id(0) % programs * BLOCKS_A_PROGRAM + step
        inside = block < num_blocks
        column = block * BLOCK + offs
        there = column < vocab_size
        x = tl.load(logits + row * logits_stride + column, there, other=float("-inf"))
        x = x.to(tl.float32)
        peak = tl.max(x, 0)
        total = tl.sum(tl.exp(x - finite_peak(peak)), 0)
        place = stats + row * num_blocks + block
        tl.store(place, peak, inside)
        tl.store(place + plane, total, inside)
        if PLAIN:
            tl.store(place + 2 * plane, peak, inside)
            tl.store(place + 3 * plane, total, inside)
        else:
            if SAME:  # one read serves both
                s = forbid(x, allowed, column, vocab_size, SUPPRESS)
            else:
                s = load_scores(scores, allowed, row * scores_stride, column, vocab_size, SUPPRESS)
            peak = tl.max(s, 0)
            total = tl.sum(tl.exp((s - finite_peak(peak)) * inverse_temperature), 0)
            tl.store(place + 2 * plane, peak, inside)
            tl.store(place + 3 * plane, total, inside)


@triton.jit
def next_digit(
    scores,
    allowed,
    row_offs,
    prefix,
    shift,
    floor_key,
    peak,
    vocab_size,
    inverse_temperature,
    COUNT: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weight by the next 4 bits, of the numbers whose higher bits are `prefix`: float64 [16].

    The weight is 1 (COUNT) or the tempered exponential, of numbers at least `floor_key`.
    """
    bins = tl.zeros([16], tl.float64)
    digit = tl.arange(0, 16)
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = load_scores(scores, allowed, row_offs, column, vocab_size, SUPPRESS)
        key = ordered_key(s)
        member = (column < vocab_size) & (key >= floor_key) & (((key >> shift) >> 4) == prefix)
        if COUNT:
            weight = tl.where(member, 1.0, 0.0)
        else:
            weight = tl.where(member, tl.exp((s - peak) * inverse_temperature), 0.0)
        mine = ((key >> shift) & 15)[:, None] == digit[None, :]
        bins += tl.sum(tl.where(mine, weight[:, None], 0.0), 0).to(tl.float64)
    return bins


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
    row_offs = row * scores_stride
    plane = num_rows.to(tl.int64) * num_blocks
    digit = tl.arange(0, 16)
    block_ids = tl.arange(0, MAX_BLOCKS)
    peaks = tl.load(
        stats + 2 * plane + row * num_blocks + block_ids,
        block_ids < num_blocks,
        other=float("-inf"),
    )
    peak = finite_peak(tl.max(peaks, 0))

    cutoff = tl.zeros([], tl.uint32)
    if USE_TOP_K:
        # The largest key with at least top_k keys at or above it. `above` counts the keys with
        # higher digits than those chosen so far.
        above = tl.zeros([], tl.float64)
        prefix = tl.zeros([], tl.uint32)
        for step in range(DIGITS):
            shift = 28 - 4 * step
            bins = next_digit(
                scores,
                allowed,
                row_offs,
                prefix,
                shift,
                cutoff,
                peak,
                vocab_size,
                inverse_temperature,
                True,
                SUPPRESS,
                BLOCK,
            )
            # bins from this digit up, for each digit
            from_digit = tl.sum(tl.where(digit[None, :] >= digit[:, None], bins[None, :], 0.0), 1)
            chosen = tl.max(tl.where(above + from_digit >= top_k, digit, 0), 0)
            above += tl.sum(tl.where(digit > chosen, bins, 0.0), 0)
            prefix = prefix * 16 + chosen.to(tl.uint32)
        cutoff = prefix << (32 - 4 * DIGITS)
    if USE_TOP_P:
        # The least key with less than top_p of the mass strictly above it.
        above = tl.zeros([], tl.float64)
        prefix = tl.zeros([], tl.uint32)
        limit = tl.zeros([], tl.float64)
        for step in range(DIGITS):
            shift = 28 - 4 * step
            bins = next_digit(
                scores,
                allowed,
                row_offs,
                prefix,
                shift,
                cutoff,
                peak,
                vocab_size,
                inverse_temperature,
                False,
                SUPPRESS,
                BLOCK,
            )
            if step == 0:
                limit = tl.sum(bins, 0) * top_p
            over_digit = tl.sum(tl.where(digit[None, :] > digit[:, None], bins[None, :], 0.0), 1)
            chosen = tl.min(tl.where(above + over_digit < limit, digit, 15), 0)
            above += tl.sum(tl.where(digit > chosen, bins, 0.0), 0)
            prefix = prefix * 16 + chosen.to(tl.uint32)
        cutoff = tl.maximum(cutoff, prefix << (32 - 4 * DIGITS))
    tl.store(cutoffs + row, cutoff.to(tl.int64))

    for block in range(0, num_blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        s = load_scores(scores, allowed, row_offs, column, vocab_size, SUPPRESS)
        block_peak = tl.load(stats + 2 * plane + row * num_blocks + block)
        weight = tl.exp((s - finite_peak(block_peak)) * inverse_temperature)
        stays = ordered_key(s) >= cutoff
        total = tl.sum(tl.where(stays, weight, 0.0), 0)
        # A NaN has no place in the order: it must reach the sum all the same.
        total = tl.where(tl.sum(weight, 0) >= 0, total, float("nan"))
        tl.store(stats + 3 * plane + row * num_blocks + block, total)


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
    peaks = tl.load(place, there, other=float("-inf"))
    totals = tl.load(place + plane, there, other=0.0)
    peak = tl.max(peaks, 0)
    lse = peak + tl.log(tl.sum(totals * tl.exp(peaks - finite_peak(peak)), 0))

    score_peaks = tl.load(place + 2 * plane, there, other=float("-inf"))
    score_totals = tl.load(place + 3 * plane, there, other=0.0)
    score_peak = tl.max(score_peaks, 0)
    offs = tl.arange(0, BLOCK)
    if GREEDY:
        block = tl.min(tl.where(score_peaks == score_peak, block_ids, MAX_BLOCKS - 1), 0)
        column = block * BLOCK + offs
        s = load_scores(scores, allowed, row * scores_stride, column, vocab_size, SUPPRESS)
        local = tl.min(tl.where(s == score_peak, offs, BLOCK - 1), 0)
        sane = tl.sum(score_totals, 0) > 0
    else:
        base = finite_peak(score_peak)
        masses = score_totals.to(tl.float64)
        masses *= tl.exp((score_peaks - base) * inverse_temperature).to(tl.float64)
        cdf = tl.cumsum(masses, 0)
        total = tl.sum(masses, 0)
        level = tl.load(uniforms + row) * total
        # Rounding may take the level to the total: stay at the last block that has any mass.
        last = tl.max(tl.where(masses > 0, block_ids, 0), 0)
        block = tl.minimum(tl.sum((cdf <= level).to(tl.int32), 0), last)
        before = tl.sum(tl.where(block_ids < block, masses, 0.0), 0)
        column = block * BLOCK + offs
        s = load_scores(scores, allowed, row * scores_stride, column, vocab_size, SUPPRESS)
        weights = tl.exp((s - base) * inverse_temperature)
        if FILTERED:
            cutoff = tl.load(cutoffs + row).to(tl.uint32)
            weights = tl.where(ordered_key(s) >= cutoff, weights, 0.0)
        inner = tl.cumsum(weights.to(tl.float64), 0)
        last = tl.max(tl.where(weights > 0, offs, 0), 0)
        # The block's float32 sum and the sum of its columns differ in the last bits.
        mass = tl.sum(tl.where(block_ids == block, masses, 0.0), 0)
        share = (level - before) / tl.where(mass > 0, mass, 1.0)
        rest = tl.maximum(share * tl.sum(weights.to(tl.float64), 0), 0.0)
        local = tl.minimum(tl.sum((inner <= rest).to(tl.int32), 0), last)
        sane = total > 0
    token = block * BLOCK + local
    sane = sane & (lse == lse) & (tl.abs(score_peak) < float("inf")) & (token < vocab_size)
    token = tl.where(sane, token, 0)
    chosen = tl.load(logits + row * logits_stride + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logps + row, tl.where(sane, chosen - lse, float("nan")))
