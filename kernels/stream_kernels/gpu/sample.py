"""Triton sampling: the logits are read once, then one block of each row again.

`block_stats_kernel` leaves, for each block of columns, its maximum and sum of exponentials, both
of the raw logits (for the log-prob) and of the tempered ones. `choose_kernel`, one program a row,
takes the block in which the row's uniform falls, reads it again and takes the token. Between the
two, `filter_kernel` (only with top-k or top-p) takes the filtered mass out of the sums; the logits
then come from L2. No program looks at another row.
Legend: R rows, V vocabulary, J blocks of a row.
"""

import torch
import triton
from torch import Tensor

from stream_kernels.gpu.block_stats import take_block_stats
from stream_kernels.gpu.choose import choose
from stream_kernels.gpu.launch import on_own_device
from stream_kernels.gpu.scores import BLOCK, Draw
from stream_kernels.gpu.top_k_top_p import keep_likeliest


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
    if num_rows == 0:
        empty = torch.empty(0, device=logits.device)
        return empty.long(), empty
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    scores = logits if penalized is None else penalized
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    allowed = logits  # a pointer that is not read
    if suppress is not None:
        allowed = torch.ones(vocab_size, dtype=torch.int8, device=logits.device)
        allowed.index_fill_(0, suppress, 0)
    draw = Draw(
        logits=logits,
        scores=scores,
        allowed=allowed,
        stats=logits.new_empty((4, num_rows, triton.cdiv(vocab_size, BLOCK)), dtype=torch.float32),
        cutoffs=logits.new_empty(num_rows, dtype=torch.int64),
        inverse_temperature=1.0 / temperature if temperature > 0 else 1.0,
        is_suppressing=suppress is not None,
    )
    take_block_stats(draw, is_tempered=temperature not in (0, 1))
    is_filtered = temperature > 0 and (0 < top_k < vocab_size or top_p < 1)
    if is_filtered:
        keep_likeliest(draw, top_k, top_p)
    return choose(draw, uniforms, is_greedy=temperature == 0, is_filtered=is_filtered)
