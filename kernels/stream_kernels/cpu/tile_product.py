"""`x @ weight.T` of bfloat16 x and weight, by the C of this folder: in AMX tiles."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels.cpu import compiled

NUMBERS = ("rows", "columns", "size", "is_bfloat16", "num_threads")
LEAST_COLUMNS = 32
STEP = 32


class Product(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out", "bias", "to")),
        *((name, ctypes.c_int64) for name in NUMBERS),
    )


@cache
def _function() -> Any:
    """The C function, or None where there is none, or no tiles, or where it is wrong."""
    library = compiled.library()
    if library is None or not library.tiles_run_here():
        return None
    return compiled.function("tile_product", Product, _agrees)


def _agrees(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (19, 75))
    truth = x.float() @ weight.float().T
    return all(
        torch.allclose(_multiply(function, x, weight, None, dtype).float(), truth, atol=atol)
        for dtype, atol in ((torch.float32, 1e-3), (torch.bfloat16, 0.2))
    )


def takes(weight: Tensor) -> bool:
    """Whether `tile_product` takes this weight [V, D], as it lies."""
    return (
        not weight.is_mkldnn
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[0] >= LEAST_COLUMNS
        and weight.shape[1] % STEP == 0
        and _function() is not None
    )


def tile_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`x @ weight.T + bias` [..., V], of bfloat16 x [..., D] and a weight that `takes` takes.

    Sums are float32, and rounded once where `dtype` is bfloat16.
    """
    return _multiply(_function(), x, weight, bias, dtype)


def _multiply(
    function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    if x.numel() == 0:
        return out
    product = Product(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        x.numel() // x.shape[-1],
        *weight.shape,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if not function(ctypes.byref(product), compiled.parallel()):
        raise MemoryError("no memory for a product's tiles")
    return out
