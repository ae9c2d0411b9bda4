"""The contract of every function, in plain torch: short, slow, what the fast forms must equal.

Legend: N tokens, D hidden or head size, V vocabulary, R rows (one query token each), B batch,
Hq/Hkv query/key heads, M queries, T prefix tokens of all groups, G groups, K rows a group,
S slots, C slot capacity. Group heads (GQA): query head h reads key head h // (Hq // Hkv).
"""

import torch
from torch import Tensor

from stream_kernels.layout import HostLayout


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`log_softmax((hidden @ weight.T)[:, :vocab_size].float())[range(N), targets]`, float32 [N].

    hidden [N, D], weight [V, D], bias [V], targets int64 [N]. The logits are, in this order,
    `hidden @ weight.T + bias`, times `logit_scale`, then `softcap * tanh(logits / softcap)`.
    Rows of `weight` at and beyond `vocab_size` (padding that the model never meant) do not count;
    the default keeps them all, as transformers does.
    """
    logits = hidden.float() @ weight.float().T  # [N, V]
    if bias is not None:
        logits = logits + bias.float()
    logits = logits[:, :vocab_size] * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


def sample(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress: Tensor | None = None,
    vocab_size: int | None = None,
    penalized: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row and its untempered, unfiltered log-prob: (int64 [R], float32 [R]).

    logits [R, V], uniforms float64 [R] in (0, 1). The token is the first, in vocabulary order, at
    which the cumulative probability exceeds `uniforms * total`: one uniform a row, inverse CDF.
    The distribution is filtered in transformers' order: temperature, then the `top_k` largest
    (0 = all; ties with the k-th stay in), then top-p: a token stays while the probability of all
    strictly likelier tokens is below `top_p`, so tied tokens stay or go together.
    `temperature == 0` takes the largest, the lowest id on ties.
    `suppress` (int64 ids) can never be sampled; `penalized` [R, V], where given, are the logits to
    sample from (after a repetition penalty, say). The log-prob is always that of `logits`.
    Columns at and beyond `vocab_size` do not exist.
    Raises FloatingPointError naming the rows that hold NaN (or +inf, or nothing to sample).
    """
    logits = logits[:, :vocab_size].float()
    scores = logits if penalized is None else penalized[:, :vocab_size].float()
    scores = scores.double()
    if suppress is not None:
        scores = scores.index_fill(1, suppress, -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True)
    bad = ~torch.isfinite(logits.sum(dim=-1).nan_to_num(neginf=0.0)) | ~torch.isfinite(peak[:, 0])
    if bad.any():
        raise FloatingPointError(f"logits of rows {bad.nonzero()[:, 0].tolist()} cannot be sampled")
    if temperature == 0:
        tokens = (scores == peak).long().argmax(dim=-1)
    else:
        probs = torch.exp((scores - peak) / temperature)
        if 0 < top_k < probs.shape[1]:
            kth = scores.topk(top_k, dim=-1).values[:, -1:]
            probs = probs * (scores >= kth)
        if top_p < 1.0:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            sorted_probs = probs.gather(1, order)
            above = sorted_probs.cumsum(dim=-1) - sorted_probs
            # A tie takes the mass above its first member.
            first = torch.searchsorted(-ordered, -ordered)
            keep = above.gather(1, first) < top_p * probs.sum(dim=-1, keepdim=True)
            probs = probs * torch.zeros_like(keep).scatter(1, order, keep)
        cdf = probs.cumsum(dim=-1)
        tokens = (cdf > uniforms.double()[:, None] * cdf[:, -1:]).long().argmax(dim=-1)
    logps = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None]).squeeze(1)
    return tokens, logps


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
    0..i. Keys at and beyond `key_lengths` [B] are masked; a query that sees no key gets output 0
    and lse -inf, which `merge_by_lse` treats as absent.
    """
    batch, heads, num_queries, size = query.shape
    kv_heads, num_keys = key.shape[1:3]
    assert heads % kv_heads == 0, f"{heads} query heads over {kv_heads} key heads"
    assert not causal or num_queries == num_keys, f"causal {num_queries} x {num_keys}"
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, num_queries, size)
    scores = torch.einsum("bhrmd,bhnd->bhrmn", grouped.float(), key.float()) * scale
    columns = torch.arange(num_keys, device=query.device)
    if causal:
        scores = scores.masked_fill(columns[None, :] > columns[:, None], -torch.inf)
    if key_lengths is not None:
        beyond = columns[None, :] >= key_lengths[:, None]  # [B, N]
        scores = scores.masked_fill(beyond[:, None, None, None, :], -torch.inf)
        value = value.masked_fill(beyond[:, None, :, None], 0.0)  # 0 * NaN is NaN
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    out = torch.einsum("bhrmn,bhnd->bhrmd", probs, value.float())
    return out.reshape(query.shape).to(query.dtype), lse.reshape(batch, heads, num_queries)


def merge_by_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over the union of two disjoint key sets, from the outputs and log-sum-exps.

    out_* [..., D], lse_* [...], natural log; float32 inside, out_a's dtype outside. A side whose
    lse is -inf is absent; two absent sides give 0.
    """
    share_b = torch.sigmoid(lse_b.float() - lse_a.float()).nan_to_num(0.0)[..., None]
    return torch.lerp(out_a.float(), out_b.float(), share_b).to(out_a.dtype)


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
    of which the first suffix_lengths[r] >= 1 tokens are valid, the current one included.
    `host` says the same as the int32 tensors and saves the CPU form from reading them.
    `new`, the current tokens' key and value [R, Hkv, D], are written to their places first.
    """
    if new is not None:
        for slab, part in zip((suffix_key, suffix_value), new):
            slab[row_slots.long(), :, suffix_lengths.long() - 1] = part
    layout = host or HostLayout.from_tensors(prefix_spans, group_rows, row_slots, suffix_lengths)
    out = torch.empty_like(query)
    for (start, length), rows in zip(layout.spans, layout.groups, strict=True):
        for row in rows:
            slot, used = layout.slots[row], layout.suffix_lengths[row]
            keys = [prefix_key[:, start : start + length], suffix_key[slot, :, :used]]
            values = [prefix_value[:, start : start + length], suffix_value[slot, :, :used]]
            out[row] = attention_with_lse(
                query[row][None, :, None],
                torch.cat(keys, dim=1)[None],
                torch.cat(values, dim=1)[None],
                scale=scale,
            )[0][0, :, 0]
    return out
