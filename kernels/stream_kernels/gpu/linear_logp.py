"""Log-probs of given tokens on CUDA: cuBLAS in chunks, or one Triton kernel without scratch.

`linear_logp_chunked` is the default: the library's product with float32 output, a chunk of the
vocabulary at a time. `linear_logp_fused` keeps the logits in registers: each program runs over its
share of the vocabulary for one tile of tokens and leaves (maximum, sum, target's logit); the shares
are combined in a fixed order, so that results repeat bit for bit.
Legend: N tokens, D hidden size, V vocabulary, S shares (splits) of the vocabulary.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stream_kernels.gpu.launch import num_processors, on_own_device
from stream_kernels.gpu.softmax import LOG2_E, NOTHING_SEEN

_CHUNK_BYTES = 48 << 20
_MIN_COLUMNS = 2048
# Token tiles that run side by side: their hidden states (16 x 1 MiB at D = 4096) stay in L2.
_TILES_TOGETHER = 16


def linear_logp_chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """The library's product, float32 out, over chunks of the vocabulary (48 MiB of logits)."""
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    columns = max(_MIN_COLUMNS, _CHUNK_BYTES // (4 * max(1, num_tokens)) // 256 * 256)
    lse = hidden.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
    target_logits = hidden.new_full((num_tokens,), torch.nan, dtype=torch.float32)
    with torch.no_grad():
        for first in range(0, vocab_size, columns):
            part = weight[first : first + columns]
            if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
                logits = torch.mm(hidden, part.T, out_dtype=torch.float32)
            else:
                logits = hidden.float() @ part.float().T
            if bias is not None:
                logits += bias[first : first + columns]
            if logit_scale != 1.0:
                logits *= logit_scale
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=1))
            local = targets - first
            inside = (local >= 0) & (local < logits.shape[1])
            chosen = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target_logits = torch.where(inside, chosen, target_logits)
    return target_logits - lse


@on_own_device
def linear_logp_fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    block_n: int = 128,
    block_v: int = 256,
    block_d: int = 64,
    num_warps: int = 8,
    num_stages: int = 3,
    splits: int | None = None,
) -> Tensor:
    """The same in one kernel; extra memory is 12 bytes a token and share.

    Raises ValueError where rows of hidden or weight are not multiples of 16 bytes, which the
    tensor memory accelerator needs.
    """
    num_tokens, size = hidden.shape
    vocab_size = weight.shape[0]
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if size * hidden.element_size() % 16 != 0 or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden {hidden.dtype} x {size}, weight {weight.dtype}: not 16-aligned")
    if num_tokens == 0:
        return hidden.new_empty(0, dtype=torch.float32)
    row_tiles = triton.cdiv(num_tokens, block_n)
    together = min(row_tiles, _TILES_TOGETHER)
    if splits is None:
        splits = max(1, round(num_processors(hidden.device) / together))
    vocab_tiles = triton.cdiv(vocab_size, block_v)
    tiles_each = triton.cdiv(vocab_tiles, min(splits, vocab_tiles))
    splits = triton.cdiv(vocab_tiles, tiles_each)
    parts = hidden.new_empty((3, splits, num_tokens), dtype=torch.float32)
    logp_kernel[(row_tiles * splits,)](
        TensorDescriptor.from_tensor(hidden, [block_n, block_d]),
        TensorDescriptor.from_tensor(weight, [block_v, block_d]),
        weight if bias is None else bias,
        targets,
        parts,
        num_tokens,
        vocab_size,
        size,
        row_tiles,
        splits,
        tiles_each,
        logit_scale,
        softcap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        BLOCK_D=block_d,
        TOGETHER=together,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    logps = combine_shares(parts)
    return logps.masked_fill((targets < 0) | (targets >= vocab_size), torch.nan)


def combine_shares(parts: Tensor) -> Tensor:
    """Log-probs [N] from what each share of the vocabulary left: [3, S, N], see logp_kernel."""
    peaks, sums, chosen = parts.unbind(0)
    peak = peaks.amax(dim=0)
    lse = peak + torch.log2((sums * torch.exp2(peaks - peak)).sum(dim=0))
    return (chosen.sum(dim=0) - lse) / LOG2_E


# The launcher makes a constant of a number that is 1, which has no `.to`.
@triton.jit(do_not_specialize=["splits"])
def logp_kernel(
    hidden,  # descriptor of [N, D]
    weight,  # descriptor of [V, D]
    bias,  # [V]
    targets,  # [N] int64
    parts,  # [3, S, N] float32: maximum, sum of exponentials, target's logit (base 2)
    num_tokens,
    vocab_size,
    size,
    row_tiles,
    splits,
    tiles_each,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    # Neighbouring programs take different tokens and the same share, so that they read the same
    # weights at the same time; TOGETHER token tiles at once bound what hidden takes of L2.
    program = tl.program_id(0)
    first_tile = program // (TOGETHER * splits) * TOGETHER
    abreast = tl.minimum(TOGETHER, row_tiles - first_tile)
    local = program - first_tile * splits
    row_start = (first_tile + local % abreast) * BLOCK_N
    split = local // abreast
    offs_n = row_start + tl.arange(0, BLOCK_N)
    in_rows = offs_n < num_tokens
    target = tl.load(targets + offs_n, in_rows, other=-1)
    peak = tl.full([BLOCK_N], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    chosen = tl.zeros([BLOCK_N], tl.float32)
    vocab_end = tl.minimum(vocab_size, (split + 1) * tiles_each * BLOCK_V)
    for vocab_start in range(split * tiles_each * BLOCK_V, vocab_end, BLOCK_V):
        logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, size, BLOCK_D):
            h = hidden.load([row_start, start])
            w = weight.load([vocab_start, start])
            logits = tl.dot(h, w.T, logits, input_precision="ieee")
        column = vocab_start + tl.arange(0, BLOCK_V)
        in_vocab = column < vocab_size
        if HAS_BIAS:
            logits += tl.load(bias + column, in_vocab, other=0.0).to(tl.float32)[None, :]
        logits = scale_and_cap(logits, logit_scale, softcap, HAS_SOFTCAP)
        logits = tl.where(in_vocab[None, :], logits * 1.4426950408889634, float("-inf"))
        is_target = column[None, :] == target[:, None]
        chosen += tl.sum(tl.where(is_target, logits, 0.0), 1)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(logits - new_peak[:, None]), 1)
        peak = new_peak

    place = parts + split.to(tl.int64) * num_tokens + offs_n
    plane = splits.to(tl.int64) * num_tokens
    tl.store(place, peak, in_rows)
    tl.store(place + plane, total, in_rows)
    tl.store(place + 2 * plane, chosen, in_rows)


@triton.jit
def scale_and_cap(logits, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The product of hidden states and weights as the model has its logits."""
    logits *= logit_scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        logits = softcap - 2 * softcap / (tl.exp(2 * logits / softcap) + 1)
    return logits
