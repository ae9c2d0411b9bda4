"""Second launch of sampling, with top-k or top-p only: what is not likely enough loses its mass.

A row's cutoff is found bit by bit of the floats' ordered integers, two at a time: a pass over the
row weighs what lies above each of three candidates. Its sums stay in a thread's registers until the
end, and it ends where what is above the cutoff is just what was asked for.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from stream_kernels.gpu.scores import BLOCK, Draw, finite_peak, load_scores, ordered_key

# Leading bits that tell two numbers of the dtype apart once both are float32; even.
_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
_TILE = 4096


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
        BITS=_BITS[draw.scores.dtype],
        BLOCK=BLOCK,
        TILE=_TILE,
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
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
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
        cutoff = highest_cutoff(columns, cutoff, top_k, True, SUPPRESS, BITS, TILE)
    if USE_TOP_P:
        floor = cutoff
        mass, _, _ = weights_from(columns, floor, (floor, floor, floor), False, SUPPRESS, TILE)
        cutoff = highest_cutoff(columns, floor, mass * top_p, False, SUPPRESS, BITS, TILE)
    tl.store(cutoffs + row, cutoff.to(tl.int64))

    for block in range(0, num_blocks):
        block_peak = tl.load(row_stats + block)
        total = tl.load(row_stats + plane + block)
        if ordered_key(block_peak) >= cutoff:
            column = block * BLOCK + tl.arange(0, BLOCK)
            s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
            weight = tl.exp((s - finite_peak(block_peak)) * inverse_temperature)
            kept = tl.sum(tl.where(ordered_key(s) >= cutoff, weight, 0.0), 0)
        else:
            kept = 0.0
        # A NaN has no place in the order: it must reach the sum all the same.
        tl.store(row_stats + plane + block, tl.where(total >= 0, kept, float("nan")))


@triton.jit
def highest_cutoff(
    columns,
    floor,
    target,
    COUNT: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest key from which on the row weighs at least `target`, or one that keeps as much.

    Arguments as for `weights_from`.
    """
    cutoff = tl.zeros([], tl.uint32)
    weight = tl.full([], float("inf"), tl.float64)  # from the cutoff on
    shift = 32
    while (shift > 32 - BITS) & (weight != target):
        shift -= 2
        unit = tl.full([], 1, tl.uint32) << shift
        keys = (cutoff + unit, cutoff + 2 * unit, cutoff + 3 * unit)
        one, two, three = weights_from(columns, floor, keys, COUNT, SUPPRESS, TILE)
        step = (one >= target).to(tl.uint32) + (two >= target).to(tl.uint32)
        step += (three >= target).to(tl.uint32)
        weight = tl.where(one >= target, one, weight)
        weight = tl.where(two >= target, two, weight)
        weight = tl.where(three >= target, three, weight)
        cutoff += step * unit
    return tl.maximum(floor, cutoff)


@triton.jit
def weights_from(
    columns, floor, keys, COUNT: tl.constexpr, SUPPRESS: tl.constexpr, TILE: tl.constexpr
):
    """What the row's numbers weigh from each of three keys up: float64.

    A number's weight is 1 (COUNT), or its tempered exponential, and 0 where its key is below
    `floor`. columns: (scores of the row, allowed, V, the row's peak, inverse temperature).
    """
    row_scores, allowed, vocab_size, peak, inverse_temperature = columns
    one, two, three = keys
    from_one = tl.zeros([TILE], tl.float32)
    from_two = tl.zeros([TILE], tl.float32)
    from_three = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab_size, TILE):
        column = start + tl.arange(0, TILE)
        s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
        key = ordered_key(s)
        there = (column < vocab_size) & (key >= floor)
        if COUNT:
            weight = tl.where(there, 1.0, 0.0)
        else:
            weight = tl.where(there, tl.exp((s - peak) * inverse_temperature), 0.0)
        from_one += tl.where(key >= one, weight, 0.0)
        from_two += tl.where(key >= two, weight, 0.0)
        from_three += tl.where(key >= three, weight, 0.0)
    return (
        tl.sum(from_one.to(tl.float64), 0),
        tl.sum(from_two.to(tl.float64), 0),
        tl.sum(from_three.to(tl.float64), 0),
    )
