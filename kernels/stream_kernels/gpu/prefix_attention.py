"""Triton decode attention of many rows over shared prefixes and their own suffixes.

Two forms. Fused, for few query rows a group (MHA): one program a (key head, group) reads the
prefix once for all its rows, then all their suffixes as one ragged stream of tokens; one launch,
no merge. Split, for many query rows a group (GQA) or too few programs to fill the device: one
launch over (key head, group, part of the prefix) leaves normalised partial results in float32, a
second, one program a (key head, row), runs the suffix and takes the partials in.
Legend as in `stream_kernels.reference`; REP query heads share a key head.
"""

# mypy: allow-untyped-defs

import torch
import triton
from torch import Tensor

from stream_kernels.gpu.launch import num_processors, on_own_device
from stream_kernels.gpu.prefix_batch import PrefixBatch
from stream_kernels.gpu.prefix_fused import attend_fused
from stream_kernels.gpu.prefix_split import attend_split

_FUSED_ROWS = 32  # above this a group's suffix tiles would be mostly masked


@on_own_device
def prefix_attention_cuda(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_spans: Tensor,
    group_rows: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    row_slots: Tensor,
    suffix_lengths: Tensor,
    *,
    scale: float,
) -> Tensor:
    """`stream_kernels.prefix_attention` for CUDA tensors. Waits for nothing; graphs can hold it."""
    num_rows, heads, _ = query.shape
    kv_heads = suffix_key.shape[1]
    num_groups, group_size = group_rows.shape
    if num_rows == 0:
        return torch.empty_like(query)
    rows_in_tile = triton.next_power_of_2(group_size * (heads // kv_heads))
    enough = 2 * num_processors(query.device)
    is_fused = rows_in_tile <= _FUSED_ROWS and num_groups * kv_heads >= enough
    form = attend_fused if is_fused else attend_split
    batch = PrefixBatch(
        query.contiguous(),
        prefix_key.contiguous(),
        prefix_value.contiguous(),
        prefix_spans.contiguous(),
        group_rows.contiguous(),
        suffix_key,
        suffix_value,
        row_slots,
        suffix_lengths,
    )
    return form(batch, scale)
