"""`sample` by the C of this folder. Legend: R rows, V vocabulary."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels import reference
from stream_kernels.cpu import compiled

POINTERS = ("logits", "scores", "uniforms", "suppress", "tokens", "chosen", "peaks", "totals")
NUMBERS = (
    *("rows", "columns", "row_stride", "score_stride", "num_suppressed", "top_k"),
    "num_threads",
)


class Sampling(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
    )


@cache
def _function() -> Any:
    """The C function, or None where it cannot be had or is wrong."""
    return compiled.function("draw_tokens", Sampling, _agrees)


def serves(logits: Tensor, penalized: Tensor | None) -> bool:
    """Whether `draw_tokens` takes these."""
    given = (logits,) if penalized is None else (logits, penalized)
    return (
        all(each.dtype == torch.float32 and each.stride(1) == 1 for each in given)
        and _function() is not None
    )


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    suppress: Tensor | None,
    penalized: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`sample` of what `serves` takes; the log-prob of a row that cannot be drawn is NaN."""
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _draw(_function(), logits, uniforms, penalized, suppress, **options)


def _draw(
    function: Any,
    logits: Tensor,
    uniforms: Tensor,
    penalized: Tensor | None,
    suppress: Tensor | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = logits.shape
    uniforms = uniforms.double().contiguous()
    suppress = torch.empty(0, dtype=torch.int64) if suppress is None else suppress.contiguous()
    assert suppress.dtype == torch.int64, f"{suppress.dtype}"
    scores = logits if penalized is None else penalized
    tokens = torch.empty(num_rows, dtype=torch.int64)
    chosen, peaks = torch.empty(2, num_rows)
    totals = torch.empty(num_rows, dtype=torch.float64)
    given = logits, scores, uniforms, suppress, tokens, chosen, peaks, totals
    sampling = Sampling(
        *(each.data_ptr() for each in given),
        num_rows,
        vocab_size,
        logits.stride(0),
        scores.stride(0),
        len(suppress),
        top_k if top_k < vocab_size else 0,
        torch.get_num_threads(),
        temperature,
        top_p,
    )
    if not function(ctypes.byref(sampling), compiled.parallel()):
        raise MemoryError("no memory to sample a row")
    return tokens, (chosen.double() - peaks - totals.log()).float()


def _agrees(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 700, generator=generator) * 3
    uniforms = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    suppress = logits[:2].argmax(dim=1)
    settings = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 9, 1.0), (1.3, 0, 0.8))
    for temperature, top_k, top_p in settings:
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        tokens, logps = _draw(function, logits, uniforms, logits * 0.9, suppress, **options)
        options |= {"suppress": suppress, "penalized": logits * 0.9}
        expected, truth = reference.sample(logits, uniforms, **options)
        if not (torch.equal(tokens, expected) and torch.allclose(logps, truth, atol=1e-5)):
            return False
    return True
