"""Triton flash attention that returns its log-sum-exp, with packed query heads (GQA).

It serves scoring and prefill of suffixes over a prefix: a few hundred queries against less than a
thousand keys, a small share of the model's work.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.gpu.launch import on_own_device, tile_options
from stream_kernels.gpu.softmax import (
    LOG2_E,
    attend_tile,
    load_queries,
    log2_sum_exp,
    start_softmax,
    store_output,
)


@on_own_device
def attention_with_lse_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`stream_kernels.attention_with_lse` for CUDA tensors; keys may be strided in all but D."""
    batch, heads, num_queries, size = query.shape
    kv_heads, num_keys = key.shape[1:3]
    repeats = heads // kv_heads
    query = query.contiguous()
    if key.stride(-1) != 1 or key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    num_rows = repeats * num_queries  # the heads of a key head lie end to end
    options = tile_options(num_rows, size, query.element_size())
    attention_kernel[(triton.cdiv(num_rows, options["BLOCK_M"]) * batch * kv_heads,)](
        query,
        key,
        value,
        query if key_lengths is None else key_lengths,
        out,
        lse,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        scale * LOG2_E,
        num_rows,
        num_queries,
        num_keys,
        KV_HEADS=kv_heads,
        CAUSAL=causal,
        HAS_LENGTHS=key_lengths is not None,
        D=size,
        **options,
    )
    return out, lse


# Else each kind of length (1, a multiple of 16, others) of each would be a kernel to compile.
@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_keys"])
def attention_kernel(
    query,  # [B, Hkv, rows, D]
    key,  # [B, Hkv, N, D]
    value,
    key_lengths,  # [B]
    out,  # [B, Hkv, rows, D]
    lse,  # [B, Hkv, rows] float32, natural log
    batch_stride,
    head_stride,
    key_stride,
    scale_log2,
    num_rows,
    num_queries,
    num_keys,
    KV_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    pair = (tl.program_id(0) // row_tiles).to(tl.int64)
    batch = pair // KV_HEADS
    offs_m = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    row_mask = offs_m < num_rows
    queries, query_offs, query_mask = load_queries(
        query, pair * num_rows + offs_m, row_mask, D, BLOCK_D
    )
    peak, total, acc = start_softmax(BLOCK_M, BLOCK_D)

    end = num_keys
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(key_lengths + batch).to(tl.int32))
    position = offs_m % num_queries
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(row_mask, position, 0), 0) + 1)
    pair_offs = batch * batch_stride + (pair % KV_HEADS) * head_stride
    for first in range(0, end, BLOCK_N):
        token = first + offs_n
        there = token < end
        offs = pair_offs + token.to(tl.int64)[:, None] * key_stride + offs_d[None, :]
        mask = there[:, None] & (offs_d < D)[None, :]
        keys = tl.load(key + offs, mask, other=0.0)
        values = tl.load(value + offs, mask, other=0.0)
        allowed = there[None, :] & row_mask[:, None]
        if CAUSAL:
            allowed = allowed & (token[None, :] <= position[:, None])
        peak, total, acc = attend_tile(queries, keys, values, allowed, peak, total, acc, scale_log2)

    natural = log2_sum_exp((peak, total, acc)) * 0.6931471805599453
    tl.store(lse + pair * num_rows + offs_m, natural, row_mask)
    store_output(out, query_offs, query_mask, (peak, total, acc))
