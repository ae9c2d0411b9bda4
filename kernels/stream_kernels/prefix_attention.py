"""Decode attention of many rows that share prefixes: each prefix is read once, not once a row.

On CPU: `cpu/decode_attention.py` where that runs, else two torch flash calls (a group's rows over
its prefix; each slot over its suffix) merged by their log-sum-exps, as Hydragen does (Juravsky et
al. 2024). On CUDA: `gpu/prefix_attention.py`.
Legend: R rows, Hq/Hkv query/key heads, D head size, k rows of one group.
"""

import torch
from torch import Tensor

from stream_kernels.attention import attention_with_lse, merge_by_lse
from stream_kernels.cpu.decode_attention import decode_attention, serves
from stream_kernels.forms import takes_triton
from stream_kernels.layout import HostLayout


def prefix_attention(
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
    host: HostLayout | None = None,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Decode attention of rows, each over its group's prefix and its own suffix: [R, Hq, D].

    query [R, Hq, D], one token a row. prefix_key, prefix_value [Hkv, T, D] hold all prefixes;
    group g owns tokens start .. start + length of prefix_spans[g] (int32 [G, 2]) and the rows
    group_rows[g] (int32 [G, K], padded with -1); each row belongs to exactly one group.
    suffix_key, suffix_value [S, Hkv, C, D]: row r owns slot row_slots[r] (int32 [R], any order),
    of which the first suffix_lengths[r] >= 1 tokens are valid, the current one included; the rest
    of the slab must be finite numbers (allocate it with zeros).
    `host` says the same as the int32 tensors and saves the CPU form from reading them: make one a
    step, for all layers.
    `new`, the current tokens' key and value [R, Hkv, D], where they are not in the slabs yet: they
    are written to their places first.
    """
    heads, kv_heads = query.shape[1], suffix_key.shape[1]
    assert heads % kv_heads == 0, f"{heads} query heads over {kv_heads} key heads"
    if takes_triton(query.device):
        from stream_kernels.gpu.prefix_attention import prefix_attention_cuda

        if new is not None:
            _write(new, suffix_key, suffix_value, row_slots, suffix_lengths)
        return prefix_attention_cuda(
            query,
            prefix_key,
            prefix_value,
            prefix_spans,
            group_rows,
            suffix_key,
            suffix_value,
            row_slots,
            suffix_lengths,
            scale=scale,
        )
    if query.shape[0] == 0:
        return torch.empty_like(query)
    prefix, suffix = (prefix_key, prefix_value), (suffix_key, suffix_value)
    if serves(query, prefix, suffix):
        layout = (prefix_spans, group_rows, row_slots, suffix_lengths)
        return decode_attention(query, prefix, suffix, layout, scale=scale, new=new)
    if new is not None:
        _write(new, suffix_key, suffix_value, row_slots, suffix_lengths)
    if host is None:
        host = HostLayout.from_tensors(prefix_spans, group_rows, row_slots, suffix_lengths)
    prefix_out, prefix_lse = _attend_prefixes(query, prefix_key, prefix_value, host, scale)
    suffix_out, suffix_lse = _attend_suffixes(query, suffix_key, suffix_value, host, scale)
    return merge_by_lse(prefix_out, prefix_lse, suffix_out, suffix_lse)


def _write(
    new: tuple[Tensor, Tensor],
    suffix_key: Tensor,
    suffix_value: Tensor,
    row_slots: Tensor,
    suffix_lengths: Tensor,
) -> None:
    slots, last = row_slots.long(), suffix_lengths.long() - 1
    suffix_key[slots, :, last], suffix_value[slots, :, last] = new


def _attend_prefixes(
    query: Tensor, key: Tensor, value: Tensor, host: HostLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """A group's queries are the rows of one call over its prefix: ([R, Hq, D], [R, Hq])."""
    heads, size = query.shape[1:]
    kv_heads = key.shape[0]
    counts = [len(rows) for rows in host.groups]
    outs, lses = [], []
    for (start, length), rows in zip(
        host.spans, host.by_group.take(query).split(counts), strict=True
    ):
        if len(rows) == 0:
            continue
        per_kv_head = rows.view(len(rows), kv_heads, -1, size).transpose(0, 1)
        out, lse = attention_with_lse(
            per_kv_head.reshape(1, kv_heads, -1, size),
            key[None, :, start : start + length],
            value[None, :, start : start + length],
            scale=scale,
        )
        outs.append(out.view(per_kv_head.shape).transpose(0, 1).reshape(-1, heads, size))
        lses.append(lse.view(per_kv_head.shape[:3]).transpose(0, 1).reshape(-1, heads))
    give_back = host.by_group.give_back
    return give_back(torch.cat(outs)), give_back(torch.cat(lses))


def _attend_suffixes(
    query: Tensor, key: Tensor, value: Tensor, host: HostLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """The slab is used where it lies: queries go to the slots' order and results come back."""
    heads, size = query.shape[1:]
    counts = [run.last - run.first for run in host.suffix_runs]
    outs, lses = [], []
    for run, rows in zip(host.suffix_runs, host.by_slot.take(query).split(counts), strict=True):
        slots = slice(run.first, run.last)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows.view(len(rows), key.shape[1], -1, size),
            key[slots, :, : run.length],
            value[slots, :, : run.length],
            attn_mask=None if run.mask is None else run.mask.to(query.dtype),
            scale=scale,
        )
        outs.append(out.reshape(-1, heads, size))
        lses.append(lse.reshape(-1, heads))
    give_back = host.by_slot.give_back
    return give_back(torch.cat(outs)), give_back(torch.cat(lses))
