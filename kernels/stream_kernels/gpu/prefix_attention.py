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
import triton.language as tl
from torch import Tensor

from stream_kernels.gpu.launch import num_processors, on_own_device, tile_options
from stream_kernels.gpu.softmax import LOG2_E, NOTHING_SEEN, attend_tile

_FUSED_ROWS = 32  # above this a group's suffix tiles would be mostly masked
_MAX_SPLITS = 8


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
    form = _fused if rows_in_tile <= _FUSED_ROWS and num_groups * kv_heads >= enough else _split
    return form(
        query.contiguous(),
        prefix_key.contiguous(),
        prefix_value.contiguous(),
        prefix_spans.contiguous(),
        group_rows.contiguous(),
        suffix_key,
        suffix_value,
        row_slots,
        suffix_lengths,
        scale,
    )


def _fused(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_spans: Tensor,
    group_rows: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    row_slots: Tensor,
    suffix_lengths: Tensor,
    scale: float,
) -> Tensor:
    _, heads, size = query.shape
    kv_heads = suffix_key.shape[1]
    num_groups, group_size = group_rows.shape
    out = torch.empty_like(query)
    fused_kernel[(num_groups * kv_heads,)](
        query,
        prefix_key,
        prefix_value,
        prefix_spans,
        group_rows,
        suffix_key,
        suffix_value,
        row_slots,
        suffix_lengths,
        out,
        prefix_key.stride(0),
        suffix_key.stride(0),
        suffix_key.stride(1),
        scale * LOG2_E,
        group_size,
        **fused_options(heads, size, kv_heads, group_size, query.element_size()),
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


def _split(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_spans: Tensor,
    group_rows: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    row_slots: Tensor,
    suffix_lengths: Tensor,
    scale: float,
) -> Tensor:
    num_rows, heads, size = query.shape
    kv_heads = suffix_key.shape[1]
    num_groups, group_size = group_rows.shape
    options = prefix_options(heads, size, kv_heads, group_size, query.element_size())
    programs = kv_heads * options["ROW_TILES"] * num_groups
    wanted = triton.next_power_of_2(triton.cdiv(2 * num_processors(query.device), programs))
    splits = min(_MAX_SPLITS, wanted)
    partial = query.new_empty((splits, num_rows, heads, size), dtype=torch.float32)
    partial_lse = query.new_empty((splits, num_rows, heads), dtype=torch.float32)
    prefix_kernel[(num_groups * kv_heads * options["ROW_TILES"], splits)](
        query,
        prefix_key,
        prefix_value,
        prefix_spans,
        group_rows,
        partial,
        partial_lse,
        prefix_key.stride(0),
        scale * LOG2_E,
        num_rows,
        group_size,
        **options,
    )
    out = torch.empty_like(query)
    suffix_kernel[(num_rows * kv_heads,)](
        query,
        suffix_key,
        suffix_value,
        row_slots,
        suffix_lengths,
        partial,
        partial_lse,
        out,
        suffix_key.stride(0),
        suffix_key.stride(1),
        scale * LOG2_E,
        num_rows,
        **suffix_options(heads, size, kv_heads, splits, query.element_size()),
    )
    return out


def prefix_options(
    heads: int, size: int, kv_heads: int, group_size: int, itemsize: int
) -> dict[str, int]:
    """Constants and launch options of `prefix_kernel`; many query rows take several tiles."""
    rep = heads // kv_heads
    tile = tile_options(group_size * rep, size, itemsize)
    row_tiles = triton.cdiv(group_size * rep, tile["BLOCK_M"])
    return {**tile, "ROW_TILES": row_tiles, "HEADS": heads, "REP": rep, "D": size}


def suffix_options(
    heads: int, size: int, kv_heads: int, splits: int, itemsize: int
) -> dict[str, int]:
    """Constants and launch options of `suffix_kernel`; most suffixes are one or two tiles."""
    rep = heads // kv_heads
    tile = tile_options(rep, size, itemsize)
    tile["BLOCK_M"] = max(16, triton.next_power_of_2(rep))  # one tile takes them all
    tile["num_stages"] = 2
    return {**tile, "SPLITS": splits, "HEADS": heads, "REP": rep, "D": size}


@triton.jit
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
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < D

    # Query row m is head m % REP of the group's member m // REP.
    member_m = offs_m // REP
    row_m = tl.load(group_rows + group * group_size + member_m, member_m < group_size, other=-1)
    query_offs = (row_m.to(tl.int64) * HEADS + kv_head * REP + offs_m % REP)[:, None] * D
    query_mask = (row_m >= 0)[:, None] & in_head[None, :]
    queries = tl.load(query + query_offs + offs_d[None, :], query_mask, other=0.0)
    peak = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start = tl.load(prefix_spans + group * 2)
    length = tl.load(prefix_spans + group * 2 + 1)
    head_offs = kv_head.to(tl.int64) * prefix_head_stride + start.to(tl.int64) * D
    for first in range(0, length, BLOCK_N):
        token = first + offs_n
        there = token < length
        offs = head_offs + token[:, None] * D + offs_d[None, :]
        mask = there[:, None] & in_head[None, :]
        keys = tl.load(prefix_key + offs, mask, other=0.0)
        values = tl.load(prefix_value + offs, mask, other=0.0)
        allowed = there[None, :] & (offs_m >= 0)[:, None]
        peak, total, acc = attend_tile(queries, keys, values, allowed, peak, total, acc, scale_log2)

    # The members' suffixes end to end: token t belongs to the member whose span holds t.
    member = tl.arange(0, MAX_K)
    row_k = tl.load(group_rows + group * group_size + member, member < group_size, other=-1)
    length_k = tl.load(suffix_lengths + row_k, row_k >= 0, other=0)
    slot_k = tl.load(row_slots + row_k, row_k >= 0, other=0)
    end_k = tl.cumsum(length_k, 0)
    begin_k = end_k - length_k
    num_tokens = tl.sum(length_k, 0)
    slot_head_offs = kv_head.to(tl.int64) * slot_head_stride
    for first in range(0, num_tokens, BLOCK_N):
        token = first + offs_n
        there = token < num_tokens
        owner = tl.sum((token[:, None] >= end_k[None, :]).to(tl.int32), 1)
        owns = owner[:, None] == member[None, :]
        slot = tl.sum(tl.where(owns, slot_k[None, :], 0), 1)
        position = token - tl.sum(tl.where(owns, begin_k[None, :], 0), 1)
        token_offs = slot.to(tl.int64) * slot_stride + slot_head_offs
        offs = token_offs[:, None] + position[:, None] * D + offs_d[None, :]
        mask = there[:, None] & in_head[None, :]
        keys = tl.load(suffix_key + offs, mask, other=0.0)
        values = tl.load(suffix_value + offs, mask, other=0.0)
        allowed = there[None, :] & (owner[None, :] == member_m[:, None])
        peak, total, acc = attend_tile(queries, keys, values, allowed, peak, total, acc, scale_log2)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + query_offs + offs_d[None, :], acc.to(out.dtype.element_ty), query_mask)


# The launcher makes a constant of a number that is 1, which has no `.to`.
@triton.jit(do_not_specialize=["num_rows"])
def prefix_kernel(
    query,  # [R, HEADS, D]
    prefix_key,  # [Hkv, T, D]
    prefix_value,
    prefix_spans,  # [G, 2]
    group_rows,  # [G, K]
    partial,  # [splits, R, HEADS, D] float32: attention over this split's keys alone
    partial_lse,  # [splits, R, HEADS] float32, base 2; -inf where the split is empty
    prefix_head_stride,
    scale_log2,
    num_rows,
    group_size,
    ROW_TILES: tl.constexpr,
    HEADS: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_tile = tl.program_id(0) % ROW_TILES
    kv_head = tl.program_id(0) // ROW_TILES % (HEADS // REP)
    group = tl.program_id(0) // (ROW_TILES * (HEADS // REP))
    split = tl.program_id(1)
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < D

    member_m = offs_m // REP
    row_m = tl.load(group_rows + group * group_size + member_m, member_m < group_size, other=-1)
    head_index = row_m.to(tl.int64) * HEADS + kv_head * REP + offs_m % REP
    row_mask = row_m >= 0
    query_mask = row_mask[:, None] & in_head[None, :]
    query_offs = head_index[:, None] * D + offs_d[None, :]
    queries = tl.load(query + query_offs, query_mask, other=0.0)
    peak = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start = tl.load(prefix_spans + group * 2)
    length = tl.load(prefix_spans + group * 2 + 1)
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1))
    head_offs = kv_head.to(tl.int64) * prefix_head_stride + start.to(tl.int64) * D
    split_start = split * tiles * BLOCK_N
    split_end = tl.minimum(length, split_start + tiles * BLOCK_N)
    for first in range(split_start, split_end, BLOCK_N):
        token = first + offs_n
        there = token < split_end
        offs = head_offs + token[:, None] * D + offs_d[None, :]
        mask = there[:, None] & in_head[None, :]
        keys = tl.load(prefix_key + offs, mask, other=0.0)
        values = tl.load(prefix_value + offs, mask, other=0.0)
        allowed = there[None, :] & (offs_m >= 0)[:, None]
        peak, total, acc = attend_tile(queries, keys, values, allowed, peak, total, acc, scale_log2)

    split_offs = split.to(tl.int64) * num_rows * HEADS
    seen = total > 0
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(partial + split_offs * D + query_offs, acc, query_mask)
    tl.store(partial_lse + split_offs + head_index, lse, row_mask)


@triton.jit(do_not_specialize=["num_rows"])
def suffix_kernel(
    query,  # [R, HEADS, D]
    suffix_key,  # [S, Hkv, C, D]
    suffix_value,
    row_slots,  # [R]
    suffix_lengths,  # [R]
    partial,  # [SPLITS, R, HEADS, D] float32
    partial_lse,  # [SPLITS, R, HEADS] float32, base 2
    out,  # [R, HEADS, D]
    slot_stride,
    slot_head_stride,
    scale_log2,
    num_rows,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(0) % (HEADS // REP)
    row = tl.program_id(0) // (HEADS // REP)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < D

    head_index = row.to(tl.int64) * HEADS + kv_head * REP + offs_m
    query_offs = head_index[:, None] * D + offs_d[None, :]
    head_mask = offs_m < REP
    query_mask = head_mask[:, None] & in_head[None, :]
    queries = tl.load(query + query_offs, query_mask, other=0.0)
    peak = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    slot = tl.load(row_slots + row)
    length = tl.load(suffix_lengths + row)
    slot_offs = slot.to(tl.int64) * slot_stride + kv_head.to(tl.int64) * slot_head_stride
    for first in range(0, length, BLOCK_N):
        token = first + offs_n
        there = token < length
        offs = slot_offs + token[:, None] * D + offs_d[None, :]
        mask = there[:, None] & in_head[None, :]
        keys = tl.load(suffix_key + offs, mask, other=0.0)
        values = tl.load(suffix_value + offs, mask, other=0.0)
        allowed = there[None, :] & (offs_m >= 0)[:, None]
        peak, total, acc = attend_tile(queries, keys, values, allowed, peak, total, acc, scale_log2)

    for split in tl.static_range(SPLITS):
        split_offs = split * num_rows.to(tl.int64) * HEADS
        lse = tl.load(partial_lse + split_offs + head_index, head_mask, other=float("-inf"))
        part = tl.load(partial + split_offs * D + query_offs, query_mask, other=0.0)
        new_peak = tl.maximum(peak, lse)
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(lse - new_peak)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        peak = new_peak

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + query_offs, acc.to(out.dtype.element_ty), query_mask)
