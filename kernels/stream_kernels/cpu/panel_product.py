"""`x @ weight.T` of float32 or bfloat16, by the C of this folder: weights as oneDNN lays them out.

bfloat16 wants a processor that multiplies it (AVX512_BF16: Zen 4, Cooper Lake and later ones).
Legend: V rows of a weight, D elements of each.
"""

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from stream_kernels.cpu import compiled

PANEL = 64
MOST_PRODUCTS = 4
PADDED = 32  # elements: what oneDNN fills a row of bfloat16 up to a multiple of
NUMBERS = ("num_products", "rows", "size", "num_threads", "is_bfloat16", "is_rounded")


class Product(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "to", "out")),
        ("columns", ctypes.c_int64),
    )


class Products(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        ("products", Product * MOST_PRODUCTS),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in NUMBERS),
    )


_lies_in_panels: dict[tuple[int, int, torch.dtype], bool] = {}
"""Of each shape [V, D] and format packed, whether oneDNN's layout is what the C file reads."""


@cache
def _function(dtype: torch.dtype) -> Any:
    """The C function, or None where it cannot be had or is wrong with this format."""
    library = compiled.library()
    if library is None or (dtype == torch.bfloat16 and not library.bfloat16_runs_here()):
        return None
    return compiled.function("panel_products", Products, partial(_agrees, dtype=dtype))


def _agrees(function: Any, *, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    sizes = (19, 46), (75, 46), (75,)
    x, weight, bias = (torch.randn(*n, generator=generator).to(dtype) for n in sizes)
    panels = _in_panels(weight)
    truth = x.float() @ weight.float().T + bias.float()
    for out, atol in ((torch.float32, 1e-4), (dtype, 1e-4 if dtype == torch.float32 else 0.2)):
        (got,) = _multiply(function, x, [(panels.data_ptr(), bias, 75)], out)
        if not torch.allclose(got.float(), truth, atol=atol):
            return False
    return True


def _in_panels(weight: Tensor) -> Tensor:
    """Panels of a weight [V, D]: [V / PANEL, D, PANEL], or [V / PANEL, D / 2, PANEL, 2]."""
    rows, size = weight.shape
    if weight.dtype == torch.float32:
        filled = torch.nn.functional.pad(weight, (0, 0, 0, -rows % PANEL))
        return filled.view(-1, PANEL, size).transpose(1, 2).contiguous()
    filled = torch.nn.functional.pad(weight, (0, -size % PADDED, 0, -rows % PANEL))
    return filled.view(-1, PANEL, filled.shape[1] // 2, 2).transpose(1, 2).contiguous()


def note_layout(weight: Tensor, packed: Tensor) -> None:
    """See how oneDNN has laid out a weight [V, D]: its first and last panel are compared.

    oneDNN decides by the shape and format, so that this holds for every weight of the same.
    """
    kind = *weight.shape, weight.dtype
    if kind not in _lies_in_panels:
        is_even = weight.dtype == torch.float32 or weight.shape[1] % 2 == 0
        can_be_read = is_even and _function(weight.dtype) is not None
        _lies_in_panels[kind] = can_be_read and _is_in_panels(weight, packed)


def _is_in_panels(weight: Tensor, packed: Tensor) -> bool:
    num_panels = -(-len(weight) // PANEL)
    try:
        start = torch.ops.mkldnn.data_ptr(packed)
        num_bytes = torch.ops.mkldnn._nbytes(packed)
    except (AttributeError, RuntimeError):  # another build or version of torch
        return False
    for panel in {0, num_panels - 1}:
        (expected,) = _in_panels(weight[panel * PANEL :][:PANEL])
        if start % 64 or num_bytes != num_panels * expected.nbytes:
            return False
        found = torch.empty_like(expected)
        ctypes.memmove(found.data_ptr(), start + panel * found.nbytes, found.nbytes)
        if not torch.equal(found, expected):
            return False
    return True


def reads(weight: Tensor) -> bool:
    """Whether `panel_products` takes this weight, packed by oneDNN."""
    if not weight.is_mkldnn:
        return False
    return _lies_in_panels.get((*weight.shape, weight.dtype), False)


def address(weight: Tensor) -> int:
    """Where the panels of a weight that `reads` takes begin."""
    return torch.ops.mkldnn.data_ptr(weight)


def panel_products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`x @ weight.T + bias` [..., V] of x [..., D] with up to four weights of `reads`, in its
    format.

    Sums are float32, and rounded once where x is bfloat16 and `dtype` is not float32.
    """
    products = [(address(w), bias, w.shape[0]) for w, bias in zip(weights, biases, strict=True)]
    return _multiply(_function(x.dtype), x, products, dtype or x.dtype)


def some_columns(x: Tensor, weight: Tensor, first: int, last: int) -> Tensor:
    """Columns first .. last of `x @ weight.T` in float32, `first` a multiple of PANEL.

    x [N, D], weight [V, D] as `reads` takes it; [N, last - first].
    """
    assert first % PANEL == 0 and x.dtype == weight.dtype, f"{first}, {x.dtype}"
    assert 0 <= first < last <= weight.shape[0], f"{first} .. {last} of {weight.shape}"
    panel_bytes = torch.ops.mkldnn._nbytes(weight) // -(-weight.shape[0] // PANEL)
    product = address(weight) + first // PANEL * panel_bytes, None, last - first
    return _multiply(_function(x.dtype), x, [product], torch.float32)[0]


def _multiply(
    function: Any,
    x: Tensor,
    products: Sequence[tuple[int, Tensor | None, int]],
    dtype: torch.dtype,
) -> list[Tensor]:
    x = x.contiguous()
    outs = [torch.empty(*x.shape[:-1], columns, dtype=dtype) for _, _, columns in products]
    if x.numel() == 0:
        return outs
    each = (
        Product(address, None if bias is None else bias.data_ptr(), None, out.data_ptr(), columns)
        for (address, bias, columns), out in zip(products, outs)
    )
    all_of_them = Products(
        (Product * MOST_PRODUCTS)(*each), x.data_ptr(), len(products), **numbers(x, dtype)
    )
    function(ctypes.byref(all_of_them), compiled.parallel())
    return outs


def numbers(x: Tensor, dtype: torch.dtype) -> dict[str, int]:
    """`NUMBERS` but the first, of products of x [..., D] that come out as `dtype`."""
    return {
        "rows": x.numel() // x.shape[-1],
        "size": x.shape[-1],
        "num_threads": torch.get_num_threads(),
        "is_bfloat16": x.dtype == torch.bfloat16,
        "is_rounded": dtype == torch.bfloat16,
    }
