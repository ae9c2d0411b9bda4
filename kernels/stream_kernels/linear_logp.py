"""Log-probs of given tokens from hidden states, without the [tokens, vocabulary] logits.

Legend: N tokens, D hidden size, V vocabulary, C vocabulary columns of one chunk.
"""

import torch
from torch import Tensor

from stream_kernels.cpu import panel_product
from stream_kernels.cpu.log_sums import (
    LogSums,
    has_sums_of_logits,
    sums_of_logits,
    sums_of_products,
    takes_products,
)
from stream_kernels.forms import takes_triton
from stream_kernels.gemm import linear

# Bytes of one chunk's logits, and of one weight chunk raised to float32: both stay in cache. Three
# times this is alive at once; the C library may keep as much again of earlier chunks, and the whole
# costs less than 16 MiB.
_CHUNK_BYTES = 2 << 20
_MAX_COLUMNS = 16384
_MAX_ROWS = 2048
# Bytes of the weight's rows that are raised to float64 at a time.
_EXACT_BYTES = 1 << 19
_PEAK_BLOCKS = 16


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """`log_softmax((hidden @ weight.T)[:, :vocab_size].float())[range(N), targets]`, float32 [N].

    hidden [N, D], weight [V, D], bias [V], targets int64 [N]. The logits are, in this order,
    `hidden @ weight.T + bias`, times `logit_scale`, then `softcap * tanh(logits / softcap)`, in
    float32 whatever the inputs' dtype. Rows of `weight` at and beyond `vocab_size` do not count.
    `packed`, what `gemm.pack_for_float32` made of the weight, is read instead where that is faster.
    On CPU the target's logit and the row's largest are float64 products: most of the error of a
    log-prob is theirs.
    """
    assert hidden.shape[0] == targets.shape[0], f"{hidden.shape} vs {targets.shape}"
    if takes_triton(hidden.device):
        from stream_kernels.gpu.linear_logp import linear_logp_chunked

        return linear_logp_chunked(
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
                hidden[first : first + _MAX_ROWS],
                weight[:vocab_size],
                targets[first : first + _MAX_ROWS],
                bias=bias,
                logit_scale=logit_scale,
                softcap=softcap,
                packed=packed,
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
    packed: Tensor | None,
) -> Tensor:
    if bias is None and softcap is None and takes_products(hidden, weight):
        sums = sums_of_products(hidden, weight, targets, scale=logit_scale)
    else:
        sums = _sums_of_chunks(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            packed=packed,
        )
    peaks = sums.peaks.double()
    lse = (peaks + sums.totals.double().log()).logsumexp(dim=0)
    highest, stretch = peaks.max(dim=0)
    peak_ids = sums.places.gather(0, stretch[None])[0].long()
    # The two logits that the result hangs on most take their exact values, in the log-sum-exp too.
    exact, exact_peaks = (
        _shape_logits(_products(hidden, weight, ids, bias), logit_scale, softcap)
        for ids in (targets.clamp(0, len(weight) - 1), peak_ids)
    )
    change = (exact - lse).exp() - (sums.chosen.double() - lse).exp()
    peak_change = (exact_peaks - lse).exp() - (highest - lse).exp()
    change += peak_change.where(peak_ids != targets, 0.0)
    return (exact - lse - torch.log1p(change)).clamp_(max=0.0).float()


def _sums_of_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    packed: Tensor | None,
) -> LogSums:
    """What the logits say, made and read one chunk of the vocabulary after the other."""
    num_tokens, size = hidden.shape
    vocab_size = weight.shape[0]
    columns = min(_MAX_COLUMNS, max(256, _CHUNK_BYTES // (4 * num_tokens)), vocab_size)
    panels = packed if packed is not None and _reads(packed, hidden) else None
    if panels is not None:
        hidden = hidden.to(panels.dtype)
        columns = -(-columns // panel_product.PANEL) * panel_product.PANEL
    else:
        hidden = hidden.float()
        if weight.dtype != torch.float32:
            columns = min(columns, max(256, _CHUNK_BYTES // (4 * size)))
    sums = LogSums.empty(-(-vocab_size // columns), num_tokens)
    read = sums_of_logits if has_sums_of_logits() else _sums_of_logits
    for stretch, first in enumerate(range(0, vocab_size, columns)):
        last = min(first + columns, vocab_size)
        chunk_bias = None if bias is None else bias[first:last].float()
        if panels is None:
            logits_NC = linear(hidden, weight[first:last].float(), chunk_bias)
        else:
            logits_NC = panel_product.some_columns(hidden, panels, first, last)
            if chunk_bias is not None:
                logits_NC.add_(chunk_bias)
        read(_shape_logits(logits_NC, logit_scale, softcap), targets, sums, stretch, first)
        del logits_NC  # before the next chunk's are made
    return sums


def _reads(packed: Tensor, hidden: Tensor) -> bool:
    is_exact = packed.dtype in (torch.float32, hidden.dtype)
    return is_exact and panel_product.reads(packed)


def _sums_of_logits(
    logits_NC: Tensor, targets: Tensor, into: LogSums, stretch: int, first_column: int
) -> None:
    """`sums_of_logits` where it is not compiled."""
    width = logits_NC.shape[1]
    # log_softmax is torch's one fused max-exp-sum pass; at the largest logit it is -log(sum).
    logps_NC = torch.log_softmax(logits_NC, dim=1)
    into.peaks[stretch], places = _row_peaks(logits_NC)
    totals = (-logps_NC.gather(1, places[:, None])[:, 0]).exp()
    into.totals[stretch] = totals.where(into.peaks[stretch] != -torch.inf, 0.0)
    into.places[stretch] = first_column + places
    local = targets - first_column
    inside = (local >= 0) & (local < width)
    chosen = logits_NC.gather(1, local.clamp(0, width - 1)[:, None])[:, 0]
    into.chosen.copy_(torch.where(inside, chosen, into.chosen))


def _row_peaks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value and its column, in a tenth of the time of `max`."""
    num_rows, width = rows.shape
    if width % _PEAK_BLOCKS:
        values, places = rows.max(dim=1)
        return values, places
    blocks = rows.view(num_rows, _PEAK_BLOCKS, -1)
    values, columns = blocks.amax(dim=1).max(dim=1)
    candidates = blocks.gather(2, columns[:, None, None].expand(-1, _PEAK_BLOCKS, 1))[:, :, 0]
    return values, candidates.argmax(dim=1) * blocks.shape[2] + columns


def _shape_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Scale and soft cap, in place."""
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _products(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden[n] @ weight[ids[n]] + bias[ids[n]]` in float64 [N], some rows at a time."""
    products = hidden.new_empty(len(ids), dtype=torch.float64)
    at_once = max(1, _EXACT_BYTES // (8 * hidden.shape[1]))
    for first in range(0, len(ids), at_once):
        rows = slice(first, first + at_once)
        products[rows] = torch.linalg.vecdot(hidden[rows].double(), weight[ids[rows]].double())
    if bias is not None:
        products += bias[ids].double()
    return products
