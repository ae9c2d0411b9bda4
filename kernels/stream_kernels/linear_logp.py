"""Log-probs of given tokens from hidden states, without the [tokens, vocabulary] logits.

Legend: N tokens, D hidden size, V vocabulary, C vocabulary columns of one chunk.
"""

import torch
from torch import Tensor

from stream_kernels.gemm import linear

# Bytes of one chunk's logits, and of one weight chunk raised to float32: both stay in cache, and
# with the second buffer the whole costs less than 16 MiB.
_CHUNK_BYTES = 4 << 20
_MAX_COLUMNS = 16384
_MAX_ROWS = 2048


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
    `hidden @ weight.T + bias`, times `logit_scale`, then `softcap * tanh(logits / softcap)`, in
    float32 whatever the inputs' dtype. Rows of `weight` at and beyond `vocab_size` do not count.
    """
    assert hidden.shape[0] == targets.shape[0], f"{hidden.shape} vs {targets.shape}"
    if hidden.device.type == "cuda":
        from stream_kernels.gpu.linear_logp import linear_logp_cuda

        return linear_logp_cuda(
            hidden,
            weight[:vocab_size],
            targets,
            bias=None if bias is None else bias[:vocab_size],
            logit_scale=logit_scale,
            softcap=softcap,
        )
    with torch.no_grad():
        parts = [
            _linear_logp_rows(
                hidden[first : first + _MAX_ROWS].float(),
                weight[:vocab_size],
                targets[first : first + _MAX_ROWS],
                bias=bias,
                logit_scale=logit_scale,
                softcap=softcap,
            )
            for first in range(0, hidden.shape[0], _MAX_ROWS)
        ]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)


def _linear_logp_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """The online form: a running log-normaliser over chunks of the vocabulary."""
    num_tokens, size = hidden.shape
    vocab_size = weight.shape[0]
    columns = min(_MAX_COLUMNS, max(256, _CHUNK_BYTES // (4 * num_tokens)), vocab_size)
    if weight.dtype != torch.float32:
        columns = min(columns, max(256, _CHUNK_BYTES // (4 * size)))
    scratch = hidden.new_empty(num_tokens * columns)
    lse = hidden.new_full((num_tokens,), -torch.inf)
    target_logits = hidden.new_full((num_tokens,), torch.nan)  # an id out of range stays NaN
    for first in range(0, vocab_size, columns):
        chunk_weight = weight[first : first + columns].float()
        chunk_bias = None if bias is None else bias[first : first + columns].float()
        width = chunk_weight.shape[0]
        logits_NC = linear(hidden, chunk_weight, chunk_bias)
        if logit_scale != 1.0:
            logits_NC.mul_(logit_scale)
        if softcap is not None:
            logits_NC.div_(softcap).tanh_().mul_(softcap)
        # log_softmax is torch's one fused max-exp-sum pass; at the largest logit it is -log(sum),
        # so that peak + log(sum) = peak - max(log_softmax).
        logps_NC = scratch[: num_tokens * width].view(num_tokens, width)
        torch.log_softmax(logits_NC, dim=1, out=logps_NC)
        torch.logaddexp(lse, logits_NC.amax(dim=1) - logps_NC.amax(dim=1), out=lse)
        local = targets - first
        inside = (local >= 0) & (local < width)
        chosen = logits_NC.gather(1, local.clamp(0, width - 1)[:, None])[:, 0]
        target_logits = torch.where(inside, chosen, target_logits)
    return target_logits - lse
