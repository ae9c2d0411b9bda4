"""The fastest `x @ weight.T` this processor has, behind one function.

torch sends float32 products to MKL, which runs at a third to a half of oneDNN's speed on AMD
processors, and bfloat16 ones to oneDNN with the weight laid out anew at each call; where there are
AMX tiles, `cpu/tile_product.py` reads it as it lies, which for few rows is faster still, as is
`cpu/panel_product.py` with a weight that oneDNN has laid out. oneDNN is reached through the
operator that inductor emits; it is not public, so the first use checks it (it exists, it is right,
it is not slower) and falls back to torch's own.
"""

import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from stream_kernels.cpu import panel_product
from stream_kernels.cpu.tile_product import takes, tile_product

# oneDNN is kept unless it is clearly slower: where both tie, every worker must choose alike,
# because the two round differently.
_CLEARLY_SLOWER = 1.3


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; x [..., D], weight [V, D] or what `pack` made of it, bias [V].

    A packed weight, or float32 on CPU without autograd, goes to oneDNN where that pays; bfloat16
    without autograd to AMX tiles, where `takes` says so; all else is
    `torch.nn.functional.linear`.
    """
    if panel_product.reads(weight):
        return panel_product.panel_products(x, (weight,), (bias,))[0]
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.device.type == "cpu" and x.dtype == weight.dtype and not trains and x.numel() > 0:
        if x.dtype == torch.float32 and onednn_pays():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if takes(weight):
            return tile_product(x, weight, bias, dtype=torch.bfloat16)
    return functional.linear(x, weight, bias)


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """`linear` of one x with each weight, up to four: in one call where all lie in panels."""
    if all(panel_product.reads(weight) for weight in weights):
        return panel_product.panel_products(x, weights, biases)
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in float32, of bfloat16 x [N, D] and weight [V, D], packed or not.

    One product in AMX tiles where `takes` says so, or in panels, else two: oneDNN rounds the first
    to bfloat16, and the second is what that has lost, computed in float32 before it is rounded in
    turn. Together they are within 2**-17 of the truth.
    """
    if panel_product.reads(weight):
        return panel_product.panel_products(x, (weight,), (bias,), dtype=torch.float32)[0]
    if takes(weight):
        result = tile_product(x, weight)
        return result if bias is None else result.add_(bias)
    operator = torch.ops.mkldnn._linear_pointwise
    rounded = operator(x, weight, None, "none", [], "")
    lost = operator.binary(x, rounded, weight, None, "sub")
    result = rounded.float().add_(lost)
    return result if bias is None else result.add_(bias)


def pack_for_float32(weight: Tensor) -> Tensor:
    """What `linear_float32` reads fastest of a bfloat16 weight, or a float32 one for `linear`."""
    if weight.dtype == torch.bfloat16:
        packed = pack(weight)
        if takes(packed) or panel_product.reads(packed) or two_products_pay():
            return packed
    return pack(weight.float())


@cache
def two_products_pay() -> bool:
    """Whether `linear_float32` is faster here than one float32 product of the same weight.

    Asked of the processor, not measured, so that every worker on it chooses alike: where bfloat16
    products run in AMX tiles, reading the weight is what takes the time, and half is read.
    """
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    if not has_tiles or not onednn_pays(torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, 64, generator=generator).bfloat16() for _ in range(2))
    try:
        got = linear_float32(x, pack(weight))
    except (AttributeError, RuntimeError):  # another build or version of torch
        return False
    return torch.allclose(got, x.float() @ weight.float().T, atol=1e-3)


def pack(weight: Tensor) -> Tensor:
    """A copy of a float32 or bfloat16 CPU weight [V, D] in oneDNN's blocked layout, for `linear`.

    Worth 1.2-1.7x for few rows. The copy is opaque: it cannot be indexed, saved or trained. Where
    oneDNN is not used, or AMX tiles read the weight as it lies, the weight itself is returned.
    """
    packable = weight.dtype in (torch.float32, torch.bfloat16) and not takes(weight)
    if weight.device.type != "cpu" or not packable or not onednn_pays(weight.dtype):
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    panel_product.note_layout(weight, packed)
    return packed


@cache
def onednn_pays(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN's operator exists here, is right, and is not clearly slower (once, ~20 ms).

    For bfloat16 the operator is compared with a packed weight: plain ones go to oneDNN anyway.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1024, generator=generator).to(dtype)
    weight = torch.randn(1024, 1024, generator=generator).to(dtype)
    with torch.no_grad():
        expected = functional.linear(x, weight)
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            tried = weight if dtype == torch.float32 else packed
            got = torch.ops.mkldnn._linear_pointwise(x, tried, None, "none", [], "")
        except (AttributeError, RuntimeError):  # another build or version of torch, or processor
            return False
        # Sums of 1024 products of unit normals, about 32 large: two bfloat16 roundings of them.
        tolerance = 1e-2 if dtype == torch.float32 else 0.5
        if not torch.allclose(got.float(), expected.float(), atol=tolerance, rtol=1e-4):
            return False
        default_s, onednn_s = [], []
        for _ in range(7):
            started = time.perf_counter()
            functional.linear(x, weight)
            between = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(x, tried, None, "none", [], "")
            default_s.append(between - started)
            onednn_s.append(time.perf_counter() - between)
    return min(onednn_s) <= _CLEARLY_SLOWER * min(default_s)
