"""`x @ weight.T` of float32, by the C of this folder: weights as oneDNN lays them out.

Legend: V rows of a weight, D elements of each.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels.cpu import compiled

PANEL = 64
MOST_PRODUCTS = 4
NUMBERS = ("num_products", "rows", "size", "num_threads")


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


_lies_in_panels: dict[tuple[int, ...], bool] = {}
"""Of each shape [V, D] that was packed, whether oneDNN's layout is what the C file reads."""


@cache
def _function() -> Any:
    """The C function, or None where it cannot be had or is wrong."""
    library = compiled.library()
    if library is None:
        return None
    function = library.panel_products
    function.argtypes = [ctypes.POINTER(Products), ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function if compiled.agrees("panel_product", lambda: _agrees(function)) else None


def _agrees(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*n, generator=generator) for n in ((19, 48), (75, 48), (75,)))
    panels = _in_panels(weight)
    (got,) = _multiply(function, x, [(panels.data_ptr(), bias, 75)])
    return torch.allclose(got, x @ weight.T + bias, atol=1e-4)


def _in_panels(weight: Tensor) -> Tensor:
    """Panels of a weight [V, D]: [V / PANEL, D, PANEL]."""
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return filled.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def note_layout(weight: Tensor, packed: Tensor) -> None:
    """See how oneDNN has laid out a float32 weight [V, D]: its first and last panel are compared.

    oneDNN decides by the shape, so that this holds for every weight of the same.
    """
    shape = tuple(weight.shape)
    if shape not in _lies_in_panels:
        _lies_in_panels[shape] = _function() is not None and _is_in_panels(weight, packed)


def _is_in_panels(weight: Tensor, packed: Tensor) -> bool:
    rows, size = weight.shape
    num_panels = -(-rows // PANEL)
    panel_bytes = PANEL * size * 4
    try:
        start = torch.ops.mkldnn.data_ptr(packed)
        num_bytes = torch.ops.mkldnn._nbytes(packed)
    except (AttributeError, RuntimeError):  # another build or version of torch
        return False
    if start % 64 or num_bytes != num_panels * panel_bytes:
        return False
    for panel in {0, num_panels - 1}:
        found = torch.empty(size, PANEL)
        ctypes.memmove(found.data_ptr(), start + panel * panel_bytes, panel_bytes)
        if not torch.equal(found, _in_panels(weight[panel * PANEL :][:PANEL])[0]):
            return False
    return True


def reads(weight: Tensor) -> bool:
    """Whether `panel_products` takes this weight, packed by oneDNN."""
    is_packed = weight.is_mkldnn and weight.dtype == torch.float32
    return is_packed and _lies_in_panels.get(tuple(weight.shape), False)


def address(weight: Tensor) -> int:
    """Where the panels of a weight that `reads` takes begin."""
    return torch.ops.mkldnn.data_ptr(weight)


def panel_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`x @ weight.T + bias` [..., V] of float32 x [..., D] with up to four weights of `reads`."""
    products = [(address(w), bias, w.shape[0]) for w, bias in zip(weights, biases, strict=True)]
    return _multiply(_function(), x, products)


def _multiply(
    function: Any, x: Tensor, products: Sequence[tuple[int, Tensor | None, int]]
) -> list[Tensor]:
    x = x.contiguous()
    outs = [torch.empty(*x.shape[:-1], columns) for _, _, columns in products]
    if x.numel() == 0:
        return outs
    size = x.shape[-1]
    each = (
        Product(address, None if bias is None else bias.data_ptr(), None, out.data_ptr(), columns)
        for (address, bias, columns), out in zip(products, outs)
    )
    numbers = len(products), x.numel() // size, size, torch.get_num_threads()
    all_of_them = Products((Product * MOST_PRODUCTS)(*each), x.data_ptr(), *numbers)
    function(ctypes.byref(all_of_them), compiled.parallel())
    return outs
