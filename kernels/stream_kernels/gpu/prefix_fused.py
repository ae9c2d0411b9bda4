"""The fused form: one program a (key head, group) reads a prefix once and all its rows' suffixes.

Legend as in `stream_kernels.reference`; REP query heads share a key head.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.gpu.launch import tile_options
from stream_kernels.gpu.prefix_batch import PrefixBatch
from stream_kernels.gpu.softmax import (
    LOG2_E,
    attend_tile,
    attend_tokens,
    load_queries,
    start_softmax,
    store_output,
)


def attend_fused(batch: PrefixBatch, scale: float) -> Tensor:
    """One launch, no merge; for few query rows a group, see `prefix_attention_cuda`."""
    _, heads, size = batch.query.shape
    kv_heads = batch.suffix_key.shape[1]
    num_groups, group_size = batch.group_rows.shape
    out = torch.empty_like(batch.query)
    fused_kernel[(num_groups * kv_heads,)](
        *batch,
        out,
        batch.prefix_key.stride(0),
        batch.suffix_key.stride(0),
        batch.suffix_key.stride(1),
        scale * LOG2_E,
        group_size,
        **fused_options(heads, size, kv_heads, group_size, batch.query.element_size()),
    )
    return out


def fused_options(
    heads: int, size: int, kv_heads: int, group_size: int, itemsize: int
) -> dict[str, int]:
    """Constants and launch options of `fused_kernel`; 2-3 programs fit a multiprocessor."""
    rep = heads // kv_heads
    tile = tile_options(group_size * rep, size, itemsize)
    tile["BLOCK_M"] = max(16, triton.next_power_of_2(group_size * rep))  # one tile takes them all
    tile["num_warps"] = 4 if tile["BLOCK_M"] == 16 else 8
    max_k = max(2, triton.next_power_of_2(group_size))
    return {**tile, "HEADS": heads, "REP": rep, "D": size, "MAX_K": max_k}


# Else 1 and multiples of 16 would each be a kernel to compile.
@triton.jit(do_not_specialize=["group_size"])
def fused_kernel(
    query,  # [R, HEADS, D]
    prefix_key,  # [Hkv, T, D]
    prefix_value,
    prefix_spans,  # [G, 2]
    group_rows,  # [G, K]
    suffix_key,  # [S, Hkv, C, D]
    suffix_value,
    row_slots,  # [R]
    suffix_lengths,  # [R]
    out,  # [R, HEADS, D]
    prefix_head_stride,
    slot_stride,
    slot_head_stride,
    scale_log2,
    group_size,
    HEADS: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(0) % (HEADS // REP)
    group = tl.program_id(0) // (HEADS // REP)
    rows_k = group_rows + group * group_size
    # Query row m is head m % REP of the group's member m // REP.
    offs_m = tl.arange(0, BLOCK_M)
    member_m = offs_m // REP
    row_m = tl.load(rows_k + member_m, member_m < group_size, other=-1)
    head_index = row_m.to(tl.int64) * HEADS + kv_head * REP + offs_m % REP
    queries, offs, mask = load_queries(query, head_index, row_m >= 0, D, BLOCK_D)
    softmax = start_softmax(BLOCK_M, BLOCK_D)

    start = tl.load(prefix_spans + group * 2)
    length = tl.load(prefix_spans + group * 2 + 1)
    base = kv_head.to(tl.int64) * prefix_head_stride + start.to(tl.int64) * D
    softmax = attend_tokens(
        queries, prefix_key, prefix_value, base, 0, length, softmax, scale_log2, D, BLOCK_N
    )

    member = tl.arange(0, MAX_K)
    row_k = tl.load(rows_k + member, member < group_size, other=-1)
    length_k = tl.load(suffix_lengths + row_k, row_k >= 0, other=0)
    slot_k = tl.load(row_slots + row_k, row_k >= 0, other=0)
    base = kv_head.to(tl.int64) * slot_head_stride
    slots = (slot_k, slot_stride, length_k, member_m)
    softmax = attend_slots(
        queries, suffix_key, suffix_value, base, slots, softmax, scale_log2, D, BLOCK_N
    )
    store_output(out, offs, mask, softmax)


@triton.jit
def attend_slots(
    query, key, value, base, slots, softmax, scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Each row's own slot of keys and values into the running softmax, which is returned.

    slots: (slot [K] of each member of the group, stride of a slot, number of tokens [K] in it,
    member [M] of each query row). The slots are read end to end: a token's owner is the member
    whose span of that sequence holds it.
    """
    peak, total, acc = softmax
    slot_k, slot_stride, length_k, member_m = slots
    member = tl.arange(0, slot_k.shape[0])
    offs_d = tl.arange(0, query.shape[1])
    end_k = tl.cumsum(length_k, 0)
    begin_k = end_k - length_k
    num_tokens = tl.sum(length_k, 0)
    for first in range(0, num_tokens, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = token < num_tokens
        owner = tl.sum((token[:, None] >= end_k[None, :]).to(tl.int32), 1)
        owns = owner[:, None] == member[None, :]
        slot = tl.sum(tl.where(owns, slot_k[None, :], 0), 1)
        position = token - tl.sum(tl.where(owns, begin_k[None, :], 0), 1)
        token_offs = base + slot.to(tl.int64) * slot_stride
        offs = token_offs[:, None] + position[:, None] * D + offs_d[None, :]
        mask = there[:, None] & (offs_d < D)[None, :]
        keys = tl.load(key + offs, mask, other=0.0)
        values = tl.load(value + offs, mask, other=0.0)
        allowed = there[None, :] & (owner[None, :] == member_m[:, None])
        peak, total, acc = attend_tile(query, keys, values, allowed, peak, total, acc, scale_log2)
    return peak, total, acc
