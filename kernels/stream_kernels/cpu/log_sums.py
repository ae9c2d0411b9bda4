"""What a log-softmax needs of logits, by the C of this folder: see `linear_logp`.

Legend: N rows, C columns of one stretch, J stretches, V vocabulary, D hidden size.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stream_kernels.cpu import compiled
from stream_kernels.cpu.tile_product import takes

POINTERS = ("x", "weight", "targets", "peaks", "totals", "chosen", "places")
NUMBERS = (*("rows", "columns", "first_column", "row_stride", "size", "stretch", "num_threads"),)
STRETCH = 1024


class LogSums(NamedTuple):
    """Of each row and stretch of columns: its largest logit, that one's column, and the sum of
    `exp(logit - largest)`; and the logit of each row's target, NaN where no stretch has it.
    """

    peaks: Tensor  # float32 [J, N]
    totals: Tensor  # float32 [J, N]
    places: Tensor  # int32 [J, N]
    chosen: Tensor  # float32 [N]

    @classmethod
    def empty(cls, num_stretches: int, num_rows: int) -> "LogSums":
        shape = num_stretches, num_rows
        return cls(
            torch.empty(shape),
            torch.empty(shape),
            torch.empty(shape, dtype=torch.int32),
            torch.full((num_rows,), torch.nan),
        )


class Arguments(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_double),
    )


@cache
def _function(name: str) -> Any:
    """One of the C file's two functions, or None where it cannot be had or is wrong here."""
    check = _logits_agree if name == "sums_of_logits" else _products_agree
    return compiled.function(name, Arguments, check)


def has_sums_of_logits() -> bool:
    """Whether `sums_of_logits` can be called."""
    return _function("sums_of_logits") is not None


def sums_of_logits(
    logits: Tensor, targets: Tensor, into: LogSums, stretch: int, first_column: int
) -> None:
    """Write what logits [N, C] say to row `stretch` of `into`; they begin at `first_column`."""
    _read_logits(_function("sums_of_logits"), logits, targets, into, stretch, first_column)


def _read_logits(
    function: Any, logits: Tensor, targets: Tensor, into: LogSums, stretch: int, first_column: int
) -> None:
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, f"{logits.dtype}"
    peaks, totals, places = (each[stretch] for each in into[:3])
    part = LogSums(peaks, totals, places, into.chosen)
    _call(function, logits, None, targets, part, first_column, 0, 1.0)


def takes_products(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `sums_of_products` takes these: bfloat16, in AMX tiles."""
    return (
        hidden.dtype == torch.bfloat16
        and takes(weight)
        and _function("sums_of_products") is not None
    )


def sums_of_products(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0
) -> LogSums:
    """What the logits `(hidden @ weight.T) * scale` say, which are never made.

    hidden [N, D] and weight [V, D] as `takes_products` takes them; stretches of STRETCH columns.
    """
    return _multiply(_function("sums_of_products"), hidden, weight, targets, scale)


def _multiply(
    function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float
) -> LogSums:
    into = LogSums.empty(-(-weight.shape[0] // STRETCH), hidden.shape[0])
    if not _call(function, hidden.contiguous(), weight, targets, into, 0, STRETCH, scale):
        raise MemoryError("no memory for a product's tiles")
    return into


def _call(
    function: Any,
    x: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    into: LogSums,
    first_column: int,
    stretch: int,
    scale: float,
) -> int:
    targets = targets.contiguous()
    arguments = Arguments(
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        targets.data_ptr(),
        into.peaks.data_ptr(),
        into.totals.data_ptr(),
        into.chosen.data_ptr(),
        into.places.data_ptr(),
        x.shape[0],
        x.shape[1] if weight is None else weight.shape[0],
        first_column,
        x.stride(0),
        x.shape[1],
        stretch,
        torch.get_num_threads(),
        scale,
    )
    return function(ctypes.byref(arguments), compiled.parallel())


def _logits_agree(function: Any) -> bool:
    logits = torch.linspace(-3, 3, 3 * 75).view(3, 75)[:, :70].sin() * 4
    targets = torch.tensor([0, 69, 80])
    into = LogSums.empty(1, 3)
    _read_logits(function, logits, targets, into, 0, 0)
    return _say(into, logits, targets)


def _products_agree(function: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (19, 75))
    targets = torch.arange(19) * 4
    return _say(
        _multiply(function, x, weight, targets, 0.5), x.float() @ weight.float().T / 2, targets
    )


def _say(into: LogSums, logits: Tensor, targets: Tensor) -> bool:
    """Whether the sums are these logits'."""
    inside = targets < logits.shape[1]
    chosen = logits.gather(1, targets.where(inside, 0)[:, None])[:, 0].where(inside, torch.nan)
    lse = (into.peaks + into.totals.log()).logsumexp(dim=0)
    return (
        torch.allclose(lse, logits.logsumexp(dim=1), atol=1e-4)
        and torch.allclose(into.chosen, chosen, atol=1e-4, equal_nan=True)
        and torch.equal(into.places[0].long(), logits.argmax(dim=1))
    )
