"""The split form: parts of prefixes side by side, then a row's suffix, which takes the parts in.

Legend as in `stream_kernels.reference`; REP query heads share a key head.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.gpu.launch import num_processors, tile_options
from stream_kernels.gpu.prefix_batch import PrefixBatch
from stream_kernels.gpu.softmax import (
    LOG2_E,
    attend_tokens,
    load_queries,
    log2_sum_exp,
    start_softmax,
    store_output,
)

_MAX_SPLITS = 8


def attend_split(batch: PrefixBatch, scale: float) -> Tensor:
    """Two launches; for many query rows a group, or few groups, see `prefix_attention_cuda`."""
    query, (num_rows, heads, size) = batch.query, batch.query.shape
    kv_heads = batch.suffix_key.shape[1]
    num_groups, group_size = batch.group_rows.shape
    options = prefix_options(heads, size, kv_heads, group_size, query.element_size())
    programs = kv_heads * options["ROW_TILES"] * num_groups
    wanted = triton.next_power_of_2(triton.cdiv(2 * num_processors(query.device), programs))
    splits = min(_MAX_SPLITS, wanted)
    partial = query.new_empty((splits, num_rows, heads, size), dtype=torch.float32)
    partial_lse = query.new_empty((splits, num_rows, heads), dtype=torch.float32)
    prefix_kernel[(num_groups * kv_heads * options["ROW_TILES"], splits)](
        *batch[:5],  # up to group_rows
        partial,
        partial_lse,
        batch.prefix_key.stride(0),
        scale * LOG2_E,
        num_rows,
        group_size,
        **options,
    )
    out = torch.empty_like(query)
    suffix_kernel[(num_rows * kv_heads,)](
        query,
        *batch[5:],  # from suffix_key on
        partial,
        partial_lse,
        out,
        batch.suffix_key.stride(0),
        batch.suffix_key.stride(1),
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


# The launcher makes a constant of a number that is 1, which has no `.to`.
@triton.jit(do_not_specialize=["num_rows", "group_size"])
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
    # Query row m is head m % REP of the group's member m // REP.
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    member_m = offs_m // REP
    row_m = tl.load(group_rows + group * group_size + member_m, member_m < group_size, other=-1)
    head_index = row_m.to(tl.int64) * HEADS + kv_head * REP + offs_m % REP
    queries, offs, mask = load_queries(query, head_index, row_m >= 0, D, BLOCK_D)
    softmax = start_softmax(BLOCK_M, BLOCK_D)

    start = tl.load(prefix_spans + group * 2)
    length = tl.load(prefix_spans + group * 2 + 1)
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1))
    base = kv_head.to(tl.int64) * prefix_head_stride + start.to(tl.int64) * D
    first = split * tiles * BLOCK_N
    end = tl.minimum(length, first + tiles * BLOCK_N)
    softmax = attend_tokens(
        queries, prefix_key, prefix_value, base, first, end, softmax, scale_log2, D, BLOCK_N
    )
    split_offs = split.to(tl.int64) * num_rows * HEADS
    store_output(partial + split_offs * D, offs, mask, softmax)
    lse = log2_sum_exp(softmax)
    tl.store(partial_lse + split_offs + head_index, lse, row_m >= 0)


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
    head_index = row.to(tl.int64) * HEADS + kv_head * REP + offs_m
    head_mask = offs_m < REP
    queries, offs, mask = load_queries(query, head_index, head_mask, D, BLOCK_D)
    softmax = start_softmax(BLOCK_M, BLOCK_D)

    slot = tl.load(row_slots + row)
    length = tl.load(suffix_lengths + row)
    base = slot.to(tl.int64) * slot_stride + kv_head.to(tl.int64) * slot_head_stride
    softmax = attend_tokens(
        queries, suffix_key, suffix_value, base, 0, length, softmax, scale_log2, D, BLOCK_N
    )
    peak, total, acc = softmax
    for split in tl.static_range(SPLITS):
        split_offs = split * num_rows.to(tl.int64) * HEADS
        lse = tl.load(partial_lse + split_offs + head_index, head_mask, other=float("-inf"))
        part = tl.load(partial + split_offs * D + offs, mask, other=0.0)
        new_peak = tl.maximum(peak, lse)
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(lse - new_peak)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        peak = new_peak
    store_output(out, offs, mask, (peak, total, acc))
