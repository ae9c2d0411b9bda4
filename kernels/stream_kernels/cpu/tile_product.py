"""`x @ weight.T` in float32, of bfloat16 x and weight, by the C of this folder: in AMX tiles."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels.cpu import compiled

LEAST_COLUMNS = 32
STEP = 32


class Product(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "size", "num_threads")),
    )


@cache
def _function() -> Any:
    """The C function, or None where there is none, or no tiles, or where it is wrong."""
    library = compiled.library()
    if library is None or not library.tiles_run_here():
        return None
    function = library.tile_product
    function.argtypes = [ctypes.POINTER(Product), ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function if compiled.agrees("tile_product", lambda: _agrees(function)) else None


def _agrees(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (19, 75))
    return torch.allclose(_multiply(function, x, weight), x.float() @ weight.float().T, atol=1e-3)


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


def tile_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, float32 [N, V], of bfloat16 x [N, D] and a weight that `takes` takes."""
    return _multiply(_function(), x, weight)


def _multiply(function: Any, x: Tensor, weight: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    if x.shape[0] == 0:
        return out
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    product = Product(*pointers, x.shape[0], *weight.shape, torch.get_num_threads())
    if not function(ctypes.byref(product), compiled.parallel()):
        raise MemoryError("no memory for a product's tiles")
    return out
