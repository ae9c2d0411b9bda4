"""First launch of sampling: of each block of columns its maximum and sum of exponentials."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from stream_kernels.gpu.scores import BLOCK, Draw, finite_peak, forbid, load_scores

BLOCKS_A_PROGRAM = 4


def take_block_stats(draw: Draw, *, is_tempered: bool) -> None:
    """Fill `draw.stats`; without temperature, penalty and suppression its halves are the same."""
    vocab_size, num_rows, num_blocks = draw.sizes
    # The scores are the logits: they are then read once.
    same = draw.scores is draw.logits
    block_stats_kernel[(num_rows * triton.cdiv(num_blocks, BLOCKS_A_PROGRAM),)](
        draw.logits,
        draw.scores,
        draw.allowed,
        draw.stats,
        draw.logits.stride(0),
        draw.scores.stride(0),
        vocab_size,
        num_rows,
        num_blocks,
        draw.inverse_temperature,
        SAME=same,
        PLAIN=same and not draw.is_suppressing and not is_tempered,
        SUPPRESS=draw.is_suppressing,
        BLOCK=BLOCK,
        BLOCKS_A_PROGRAM=BLOCKS_A_PROGRAM,
        num_warps=4,
    )


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
    row_scores = scores + row * scores_stride
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
                s = load_scores(row_scores, allowed, column, vocab_size, SUPPRESS)
            peak = tl.max(s, 0)
            total = tl.sum(tl.exp((s - finite_peak(peak)) * inverse_temperature), 0)
            tl.store(place + 2 * plane, peak, inside)
            tl.store(place + 3 * plane, total, inside)
