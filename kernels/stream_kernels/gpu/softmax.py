"""The online softmax step that the attention kernels share."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

# Stands for "nothing seen yet" in a running maximum: -inf would make -inf - -inf of an empty row.
NOTHING_SEEN = tl.constexpr(-1.0e30)

LOG2_E = 1.4426950408889634


@triton.jit
def attend_tile(query, key, value, allowed, peak, total, acc, scale_log2):
    """One tile of keys into the running softmax of [BLOCK_M] rows, in base 2.

    query [M, D], key and value [N, D] with 0 where nothing was loaded, allowed [M, N];
    peak and total [M], acc [M, D] are float32. Returns the new (peak, total, acc).
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
