"""What the attention kernels share: tiles of queries and keys, and the online softmax over them.

Legend: M query rows of a program, N keys of a tile, D head size (BLOCK_D with its padding).
The running softmax of M rows is (peak [M], total [M], acc [M, BLOCK_D]), float32 and in base 2.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

# Stands for "nothing seen yet" in a running maximum: -inf would make -inf - -inf of an empty row.
NOTHING_SEEN = tl.constexpr(-1.0e30)

LOG2_E = 1.4426950408889634


@triton.jit
def load_queries(query, row, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `row` [M] of query [rows, D], 0 where `is_row` is false; their offsets and mask."""
    offs_d = tl.arange(0, BLOCK_D)
    offs = row[:, None] * D + offs_d[None, :]
    mask = is_row[:, None] & (offs_d < D)[None, :]
    return tl.load(query + offs, mask, other=0.0), offs, mask


@triton.jit
def start_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The running softmax of rows that have seen no key."""
    peak = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    return peak, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def attend_tile(query, key, value, allowed, peak, total, acc, scale_log2):
    """One tile of keys into the running softmax, which is returned.

    query [M, BLOCK_D], key and value [N, BLOCK_D] with 0 where nothing was loaded; allowed [M, N],
    or [1, N] where it is the same for all rows.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    scores = tl.where(allowed, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    probs = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(probs, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(probs.to(value.dtype), value, acc, input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def attend_tokens(
    query, key, value, base, first, end, softmax, scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tokens `first` to `end` of keys and values [tokens, D] that lie end to end from `base` on."""
    peak, total, acc = softmax
    offs_d = tl.arange(0, query.shape[1])
    for start in range(first, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < end
        offs = base + token[:, None] * D + offs_d[None, :]
        mask = there[:, None] & (offs_d < D)[None, :]
        keys = tl.load(key + offs, mask, other=0.0)
        values = tl.load(value + offs, mask, other=0.0)
        allowed = there[None, :]
        peak, total, acc = attend_tile(query, keys, values, allowed, peak, total, acc, scale_log2)
    return peak, total, acc


@triton.jit
def log2_sum_exp(softmax):
    """Base-2 logarithm [M] of the sum of exponentials; -inf for rows that have seen no key."""
    peak, total, _ = softmax
    seen = total > 0
    return tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))


@triton.jit
def store_output(out, offs, mask, softmax):
    """The running softmax's result into `out`; 0 for rows that have seen no key."""
    _, total, acc = softmax
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + offs, acc.to(out.dtype.element_ty), mask)
