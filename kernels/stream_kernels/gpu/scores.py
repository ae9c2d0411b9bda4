"""What the sampling kernels share: scores of columns, their order as integers, blocks of -inf.

Legend: R rows, V vocabulary, J blocks of a row.
"""

# mypy: allow-untyped-defs

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns that one program reads at a time."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """What the three launches that draw a token for each row agree on."""

    logits: Tensor  # [R, V]
    scores: Tensor  # [R, V]: the logits, or what stands for them after a penalty
    allowed: Tensor  # [V] int8 where is_suppressing, else not read
    stats: Tensor  # [4, R, J] float32, see block_stats_kernel
    cutoffs: Tensor  # [R] int64, see filter_kernel
    inverse_temperature: float
    is_suppressing: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(V, R, J)."""
        return self.logits.shape[1], self.stats.shape[1], self.stats.shape[2]


@triton.jit
def load_scores(row_scores, allowed, column, vocab_size, SUPPRESS: tl.constexpr):
    """Float32 scores of some columns of a row; -inf beyond the vocabulary and where suppressed."""
    there = column < vocab_size
    loaded = tl.load(row_scores + column, there, other=float("-inf")).to(tl.float32)
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
