"""What a decoder layer does between its products, by the C of this folder: one pass each.

They equal the torch lines that their docstrings name, of float32 or bfloat16, up to the last bit of
a mean or an exponential; gradients do not pass. Legend: N rows, D elements of one, H heads.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stream_kernels.cpu import compiled

POINTERS = ("x", "y", "out", "more_out")
NUMBERS = (
    *("rows", "size", "heads", "more_heads", "out_stride", "more_stride", "table_stride"),
    *("is_bfloat16", "num_threads"),
)
NAMES = ("rms_norm", "rotary", "silu_and_multiply")


class Layer(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("epsilon", ctypes.c_double),
    )


@cache
def _functions() -> tuple[Any, ...]:
    """The C functions, or nothing where they cannot be had or are wrong."""
    functions = tuple(compiled.function(name, Layer) for name in NAMES)
    if None in functions or not compiled.agrees("layer step", lambda: _agree(*functions)):
        return ()
    return functions


def serves(dtype: torch.dtype) -> bool:
    """Whether the functions below take tensors of this format, on CPU."""
    return dtype in (torch.float32, torch.bfloat16) and len(_functions()) == len(NAMES)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * (x.float() * rsqrt(x.float().pow(2).mean(-1) + epsilon)).to(x.dtype)`."""
    return _norm(_functions()[0], x, weight, epsilon)


def rotary(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """`x * cosines + rotate_half(x) * sines` for queries and keys, where they lie.

    query [N, Hq, D] and key [N, Hkv, D], of dense heads; cosines and sines [N, D], dense.
    """
    _rotate(_functions()[1], query, key, cosines, sines)


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of [..., D] each."""
    return _gate(_functions()[2], gate, up)


def _norm(function: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr(), None
    size = x.shape[-1]
    _call(function, x, *pointers, x.numel() // size, size, 0, 0, 0, 0, 0, epsilon=epsilon)
    return out


def _rotate(function: Any, query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> None:
    rows, heads, size = query.shape
    assert query.stride()[1:] == key.stride()[1:] == (size, 1), f"{query.stride()} {key.stride()}"
    cosines, sines = cosines.contiguous(), sines.contiguous()
    pointers = cosines.data_ptr(), sines.data_ptr(), query.data_ptr(), key.data_ptr()
    strides = query.stride(0), key.stride(0), size
    _call(function, query, *pointers, rows, size, heads, key.shape[1], *strides)


def _gate(function: Any, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    pointers = gate.data_ptr(), up.data_ptr(), out.data_ptr(), None
    size = gate.shape[-1]
    _call(function, gate, *pointers, gate.numel() // size, size, 0, 0, 0, 0, 0)
    return out


def _call(function: Any, like: Tensor, *arguments: Any, epsilon: float = 0.0) -> None:
    is_bfloat16, threads = like.dtype == torch.bfloat16, torch.get_num_threads()
    layer = Layer(*arguments, is_bfloat16, threads, epsilon)
    function(ctypes.byref(layer), compiled.parallel())


def _agree(norm: Any, rotate: Any, gate: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x, y, cosines = (torch.randn(3, 40, generator=generator).to(dtype) for _ in range(3))
        heads, other = x.view(3, 1, 40).clone(), torch.cat([y, x], dim=1).view(3, 2, 40)
        turned = [_turned(each, cosines, y) for each in (heads, other)]
        _rotate(rotate, heads, other, cosines, y)
        root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-2)
        pairs = [
            (heads, turned[0]),
            (other, turned[1]),
            (_norm(norm, x, y[0], 1e-2), y[0] * (x.float() * root).to(dtype)),
            (_gate(gate, x, y), functional.silu(x) * y),
        ]
        if not all(torch.allclose(got, truth, atol=tolerance) for got, truth in pairs):
            return False
    return True


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosines[:, None] + torch.cat((-high, low), dim=-1) * sines[:, None]
