"""Attention that also returns its log-sum-exp (LSE), and the merge of two such results.

Both run on torch's own flash kernels; query heads that share a key head are packed as rows, so
keys are never repeated. Legend: B batch, Hq/Hkv query/key heads, M queries, N keys, D head size.
"""

import torch
from torch import Tensor

from stream_kernels import reference
from stream_kernels.forms import takes_triton


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its natural log-sum-exp: (query's dtype [B, Hq, M, D], float32 [B, Hq, M]).

    query [B, Hq, M, D], key and value [B, Hkv, N, D]. `causal` (M == N only) lets query i see keys
    0..i. Keys at and beyond `key_lengths` [B] are masked, but must be finite numbers; a query that
    sees no key gets output 0 and lse -inf, which `merge_by_lse` treats as absent.
    """
    batch, heads, num_queries, size = query.shape
    kv_heads, num_keys = key.shape[1:3]
    assert heads % kv_heads == 0, f"{heads} query heads over {kv_heads} key heads"
    assert not causal or num_queries == num_keys, f"causal {num_queries} x {num_keys}"
    if num_keys == 0 or query.numel() == 0:  # torch's kernel divides by the number of keys
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf).float()
    if takes_triton(query.device):
        from stream_kernels.gpu.attention import attention_with_lse_cuda

        return attention_with_lse_cuda(
            query, key, value, scale=scale, causal=causal, key_lengths=key_lengths
        )
    if causal and key_lengths is None:
        return _flash_cpu(query, key, value, scale=scale, causal=True)
    repeats = heads // kv_heads
    mask = None
    if key_lengths is not None:
        columns = torch.arange(num_keys, device=key.device)
        hidden = (columns >= key_lengths[:, None])[:, None, None]  # [B, 1, 1, N]
        if causal:
            above = columns > columns[:, None]  # [M, N]
            hidden = hidden | above.repeat(repeats, 1)
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
    packed = query.reshape(batch, kv_heads, repeats * num_queries, size)
    out, lse = _flash_cpu(packed, key, value, scale=scale, mask=mask)
    if key_lengths is not None:  # with nothing to see, torch's kernel says lse 0
        lse = lse.masked_fill((key_lengths <= 0)[:, None, None], -torch.inf)
    return out.reshape(query.shape), lse.reshape(batch, heads, num_queries)


merge_by_lse = reference.merge_by_lse


def _flash_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's CPU flash kernel; it returns the log-sum-exp (natural log) beside the output."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
