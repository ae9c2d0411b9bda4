"""One token a row and its log-prob, with one uniform number a row and no sort of the vocabulary.

The CPU form, compiled where that can be had, finds the token by a two-level inverse CDF: sums of
short blocks first, then the block. Every step works on each row alone, so a row's token does not
depend on its neighbours.
Legend: R rows, V vocabulary, J blocks of a row, W columns of a block.
"""

from typing import Any

import torch
from torch import Tensor

from stream_kernels.cpu.sampling import draw_tokens, serves
from stream_kernels.forms import takes_triton

_BLOCK = 128
_SEARCH_BLOCK = 64
# A slab of rows is worked on at a time, so that its temporaries stay in cache.
_SLAB_ELEMENTS = 1 << 19
# Probabilities fall into bins by the leading bits of their float32 form: 8 of exponent, 4 of
# mantissa, the order kept. 1.0 is the largest.
_BIN_SHIFT = 19
_NUM_BINS = (0x3F800000 >> _BIN_SHIFT) + 1


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
    which the cumulative probability exceeds `uniforms * total`. The distribution is filtered in
    transformers' order: temperature, then the `top_k` largest (0 = all; ties with the k-th stay
    in), then top-p: a token stays while the probability of all strictly likelier tokens is below
    `top_p`, so tied tokens stay or go together. `temperature == 0` takes the largest, the lowest
    id on ties.
    `suppress` (int64 ids) can never be sampled; `penalized` [R, V], where given, are the logits to
    sample from (after a repetition penalty, say). The log-prob is always that of `logits`.
    Columns at and beyond `vocab_size` do not exist.
    Raises FloatingPointError naming the rows that hold NaN (or +inf, or nothing to sample). On
    CUDA it does not wait for the device to find out: such a row's log-prob is NaN, and
    `raise_on_nan` raises once the caller reads the log-probs back.
    """
    assert temperature >= 0 and top_k >= 0 and top_p > 0, f"{temperature=} {top_k=} {top_p=}"
    logits = logits[:, :vocab_size]
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "suppress": suppress,
        "penalized": None if penalized is None else penalized[:, :vocab_size],
    }
    if takes_triton(logits.device):
        from stream_kernels.gpu.sample import sample_cuda

        return sample_cuda(logits, uniforms, **options)
    takes = draw_tokens if serves(logits, options["penalized"]) else _sample_in_slabs
    tokens, logps = takes(logits, uniforms, **options)
    raise_on_nan(logps)
    return tokens, logps


def raise_on_nan(logps: Tensor) -> None:
    """Raise FloatingPointError naming the rows whose log-prob is NaN; waits for the device."""
    bad = torch.isnan(logps)
    if bad.any():
        rows = bad.nonzero()[:, 0].tolist()
        raise FloatingPointError(f"logits of rows {rows} are not finite: nothing can be sampled")


def _sample_in_slabs(
    logits: Tensor, uniforms: Tensor, *, penalized: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Some rows at a time; the log-prob of a row that cannot be drawn is NaN."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    logps = torch.empty(logits.shape[0], dtype=torch.float32)
    rows_at_once = max(1, min(logits.shape[0], _SLAB_ELEMENTS // logits.shape[1]))
    # One block for all slabs: temporaries of their own would go back to the system each time.
    scratch = torch.empty(2, rows_at_once, logits.shape[1])
    with torch.no_grad():
        for first in range(0, logits.shape[0], rows_at_once):
            rows = slice(first, first + rows_at_once)
            tokens[rows], logps[rows] = _sample_slab(
                logits[rows],
                uniforms[rows],
                scratch,
                penalized=None if penalized is None else penalized[rows],
                **options,
            )
    return tokens, logps


def _sample_slab(
    logits: Tensor,
    uniforms: Tensor,
    scratch: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    suppress: Tensor | None,
    penalized: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    probs, scaled = scratch[:, : logits.shape[0]]
    peak = logits.amax(dim=-1)
    torch.softmax(logits, dim=-1, out=probs)
    # The largest probability is 1 / s, where s is softmax's own float32 sum of exp(logits - peak).
    # How far that sum is off (it depends on the processor) shows in the sum of all probabilities.
    sums_RJ = _block_sums(probs)
    total = sums_RJ.double().sum(dim=-1)
    lse = peak.double() + torch.log(total / probs.amax(dim=-1))
    scores = logits if penalized is None else penalized.float()
    is_filtered = 0 < top_k < scores.shape[1]
    if temperature not in (0, 1) and not is_filtered:
        scores = torch.div(scores, temperature, out=scaled)
    if suppress is not None:
        fill = scores.index_fill_ if scores is scaled else scores.index_fill
        scores = fill(1, suppress, -torch.inf)
    if temperature == 0:
        best, tokens = scores.max(dim=-1)
        bad = torch.isnan(lse) | ~torch.isfinite(best)
    else:
        columns = None
        if is_filtered:
            scores, columns = _largest(scores, top_k)
            probs = torch.softmax(scores / temperature, dim=-1)
            sums_RJ = _block_sums(probs)
        elif scores is not logits:
            torch.softmax(scores, dim=-1, out=probs)
            sums_RJ = _block_sums(probs)
        bad = torch.isnan(lse + sums_RJ.sum(dim=-1))
        if bad.any():
            probs[bad] = 1.0  # so that the steps below meet numbers; the row is reported
            sums_RJ = _block_sums(probs)
        if top_p < 1:
            for row in probs:
                row.masked_fill_(row < _nucleus_cutoff(row, top_p), 0.0)
            sums_RJ = _block_sums(probs)
        tokens = _inverse_cdf(probs, sums_RJ, uniforms)
        if columns is not None:
            tokens = columns.gather(1, tokens[:, None])[:, 0]
    logps = (logits.gather(1, tokens[:, None])[:, 0] - lse).float()
    return tokens, logps.masked_fill_(bad, torch.nan)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Candidate columns that hold the k largest and all ties with the k-th, in ascending order.

    Returns their scores (-inf below the k-th) and their ids, both [R, candidates]. The candidates
    are the blocks with the largest maxima: k maxima are k values no smaller than the k-th of them,
    so the k-th largest of all is no smaller either, and blocks with a lower maximum hold none.
    """
    blocks_RJW, tail = _split_blocks(scores, _SEARCH_BLOCK)
    num_rows, num_blocks, width = blocks_RJW.shape
    maxima = blocks_RJW.amax(dim=-1)
    num_chosen = min(k, num_blocks)
    while True:
        chosen = maxima.topk(num_chosen, dim=-1, sorted=False).indices.sort(dim=-1).values
        expanded = chosen[:, :, None].expand(-1, -1, width)
        found = torch.cat([blocks_RJW.gather(1, expanded).flatten(1), tail], dim=1)
        kth = found.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        # Blocks left out can still tie with the k-th: then look at more of them.
        if num_chosen == num_blocks or int((maxima >= kth).sum(dim=-1).max()) <= num_chosen:
            break
        num_chosen = min(2 * num_chosen, num_blocks)
    ids = chosen[:, :, None] * width + torch.arange(width)
    tail_ids = torch.arange(num_blocks * width, scores.shape[1]).expand(num_rows, -1)
    found.masked_fill_(found < kth, -torch.inf)
    return found, torch.cat([ids.flatten(1), tail_ids], dim=1)


def _inverse_cdf(probs: Tensor, sums_RJ: Tensor, uniforms: Tensor) -> Tensor:
    """The first column whose cumulative share exceeds the row's uniform: int64 [R].

    `sums_RJ` are the float32 sums of blocks, see `_block_sums`. What is cumulative is float64, and
    a place in a block's mass is a place in the sum of its columns: no probability is too small to
    be drawn.
    """
    cdf_RJ = sums_RJ.double().cumsum(dim=1)
    level = _below(uniforms.double() * cdf_RJ[:, -1], cdf_RJ[:, -1])
    block = torch.searchsorted(cdf_RJ, level[:, None], right=True).clamp_(max=cdf_RJ.shape[1] - 1)
    before = cdf_RJ.gather(1, block) - sums_RJ.gather(1, block)
    columns = block * _BLOCK + torch.arange(_BLOCK)
    in_row = columns < probs.shape[1]  # the tail is shorter than a block
    columns.clamp_(max=probs.shape[1] - 1)
    inner = (probs.gather(1, columns).double() * in_row).cumsum(dim=1)
    # The block's float32 sum and the sum of its columns differ in the last bits.
    share = (level - before[:, 0]) / sums_RJ.gather(1, block)[:, 0]
    rest = _below(share * inner[:, -1], inner[:, -1]).clamp_(min=0)
    local = torch.searchsorted(inner, rest[:, None], right=True).clamp_(max=_BLOCK - 1)
    return columns.gather(1, local)[:, 0]


def _block_sums(probs: Tensor) -> Tensor:
    """Float32 sums [R, J + 1] of a row's blocks and of the columns left over."""
    blocks_RJW, tail = _split_blocks(probs, _BLOCK)
    return torch.cat([blocks_RJW.sum(dim=-1), tail.sum(dim=-1, keepdim=True)], dim=1)


def _below(level: Tensor, total: Tensor) -> Tensor:
    """`level`, or the largest number below `total` where rounding has taken it there."""
    return torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))


def _split_blocks(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[R, V] as whole blocks [R, J, W] and the columns left over, without a copy."""
    whole = rows.shape[1] // width * width
    return rows[:, :whole].unflatten(1, (-1, width)), rows[:, whole:]


def _nucleus_cutoff(probs: Tensor, top_p: float) -> Tensor:
    """The least probability of a row [V] that stays in the nucleus.

    A histogram of the mass by magnitude finds the bin in which the mass of likelier tokens
    reaches `top_p`; only that bin is sorted.
    """
    bins = (probs.view(torch.int32) >> _BIN_SHIFT).long()
    masses = torch.zeros(_NUM_BINS, dtype=torch.float64)
    masses.scatter_add_(0, bins, probs.double())
    from_top = masses.flip(0).cumsum(0).flip(0)
    limit = top_p * from_top[0]
    likelier_bins = torch.nn.functional.pad(from_top[1:], (0, 1))  # 0 above the last bin
    crossing = (likelier_bins < limit).long().argmax()
    inside = probs[bins == crossing].sort(descending=True).values
    likelier = likelier_bins[crossing] + inside.double().cumsum(0) - inside.double()
    return inside[likelier < limit].amin()
