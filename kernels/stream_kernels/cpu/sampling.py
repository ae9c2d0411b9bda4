"""`sample` without filters, by the C of this folder. Legend: R rows, V vocabulary."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels import reference
from stream_kernels.cpu import compiled

POINTERS = ("logits", "uniforms", "suppress", "tokens", "chosen", "peaks", "totals")
NUMBERS = ("rows", "columns", "row_stride", "num_suppressed", "num_threads")


class Sampling(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("temperature", ctypes.c_double),
    )


@cache
def _function() -> Any:
    """The C function, or None where it cannot be had or is wrong."""
    library = compiled.library()
    if library is None:
        return None
    function = library.draw_tokens
    function.argtypes = [ctypes.POINTER(Sampling), ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function if compiled.agrees("sampling", lambda: _agrees(function)) else None


def serves(logits: Tensor) -> bool:
    """Whether `draw_tokens` takes these."""
    return logits.dtype == torch.float32 and logits.stride(1) == 1 and _function() is not None


def draw_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, suppress: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`sample` at a temperature above 0; the log-prob of a row that cannot be drawn is NaN."""
    return _draw(_function(), logits, uniforms, temperature, suppress)


def _draw(
    function: Any, logits: Tensor, uniforms: Tensor, temperature: float, suppress: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    uniforms = uniforms.double().contiguous()
    suppress = torch.empty(0, dtype=torch.int64) if suppress is None else suppress.contiguous()
    assert suppress.dtype == torch.int64, f"{suppress.dtype}"
    tokens = torch.empty(num_rows, dtype=torch.int64)
    chosen, peaks = torch.empty(2, num_rows)
    totals = torch.empty(num_rows, dtype=torch.float64)
    sampling = Sampling(
        logits.data_ptr(),
        uniforms.data_ptr(),
        suppress.data_ptr(),
        tokens.data_ptr(),
        chosen.data_ptr(),
        peaks.data_ptr(),
        totals.data_ptr(),
        num_rows,
        vocab_size,
        logits.stride(0),
        len(suppress),
        torch.get_num_threads(),
        temperature,
    )
    if not function(ctypes.byref(sampling), compiled.parallel()):
        raise MemoryError("no memory to sample a row")
    return tokens, (chosen.double() - peaks - totals.log()).float()


def _agrees(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 700, generator=generator) * 3
    uniforms = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    suppress = logits[:2].argmax(dim=1)
    for temperature in (0.7, 1.0):
        tokens, logps = _draw(function, logits, uniforms, temperature, suppress)
        options: dict[str, Any] = {"temperature": temperature, "suppress": suppress}
        expected, truth = reference.sample(logits, uniforms, **options)
        if not (torch.equal(tokens, expected) and torch.allclose(logps, truth, atol=1e-5)):
            return False
    return True
