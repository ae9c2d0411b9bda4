"""`prefix_attention` by the C of this folder: one call a layer. Legend as there."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels import reference
from stream_kernels.cpu import compiled

POINTERS = (
    *("query", "prefix_key", "prefix_value", "new_key", "new_value"),
    *("suffix_key", "suffix_value", "out", "spans", "group_rows", "slots", "lengths"),
)
NUMBERS = (
    *("num_groups", "widest", "heads", "kv_heads", "size", "is_bfloat16"),
    *("query_row", "query_head", "prefix_head", "suffix_slot", "suffix_head"),
    *("new_row", "new_head", "num_threads"),
)


class Arguments(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_double),
    )


@cache
def _function() -> Any:
    """The C function, or None where it cannot be had or is wrong."""
    return compiled.function("decode_attention", Arguments, _agrees)


def _agrees(function: Any) -> bool:
    """Three rows of two groups, in both formats."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def int32(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    layout = int32([3, 66], [0, 3]), int32([0, 2], [1, -1]), int32(1, 0, 2), int32(2, 17, 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        query, *new = (normal(3, heads, 36).to(dtype) for heads in (4, 2, 2))
        prefix, suffix = normal(2, 2, 70, 36).to(dtype), normal(2, 3, 2, 20, 36).to(dtype)
        current = (new[0], new[1])
        parts = (prefix[0], prefix[1]), (suffix[0], suffix[1])
        got = _attend(function, query, *parts, layout, scale=0.2, new=current)
        given = query, *prefix, *layout[:2], *suffix, *layout[2:]
        truth = reference.prefix_attention(*given, scale=0.2, new=current)  # type: ignore[misc]
        if not torch.allclose(got, truth, atol=tolerance):
            return False
    return True


def serves(query: Tensor, prefix: tuple[Tensor, Tensor], suffix: tuple[Tensor, Tensor]) -> bool:
    """Whether `decode_attention` takes these: dense heads of up to 256 elements, one format."""
    size = query.shape[2]
    return (
        query.dtype in (torch.float32, torch.bfloat16)
        and all(part.dtype == query.dtype for part in (*prefix, *suffix))
        and size <= 256
        and size % 2 == 0
        and query.stride(2) == 1
        and prefix[0].stride()[1:] == (size, 1)
        and suffix[0].stride()[2:] == (size, 1)
        and prefix[0].stride() == prefix[1].stride()
        and suffix[0].stride() == suffix[1].stride()
        and _function() is not None
    )


def decode_attention(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    layout: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    scale: float,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`prefix_attention` of what `serves` takes; prefix and suffix are a key and a value each.

    `layout`: prefix_spans, group_rows, row_slots, suffix_lengths, int32.
    """
    return _attend(_function(), query, prefix, suffix, layout, scale=scale, new=new)


def _attend(
    function: Any,
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    layout: tuple[Tensor, ...],
    *,
    scale: float,
    new: tuple[Tensor, Tensor] | None,
) -> Tensor:
    out = torch.empty(query.shape, dtype=query.dtype)
    arguments = Arguments()
    parts = [part.contiguous() for part in layout]
    new = None if new is None else _alike(new)
    fill(arguments, query, prefix, suffix, parts, new, out, scale)
    function(ctypes.byref(arguments), compiled.parallel())
    return out


def fill(
    arguments: Arguments,
    query: Tensor,
    prefix: Sequence[Tensor],
    suffix: Sequence[Tensor],
    layout: Sequence[Tensor],
    new: Sequence[Tensor] | None,
    out: Tensor,
    scale: float,
) -> None:
    """Tell the C function what `decode_attention` is told; `layout` is dense, and of `new` both
    have the same strides."""
    given = query, *prefix, *((None, None) if new is None else new), *suffix, out, *layout
    for name, tensor in zip(POINTERS, given, strict=True):
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())
    numbers = (
        *layout[1].shape,
        query.shape[1],
        prefix[0].shape[0],
        query.shape[2],
        query.dtype == torch.bfloat16,
        *query.stride()[:2],
        prefix[0].stride(0),
        *suffix[0].stride()[:2],
        *((0, 0) if new is None else new[0].stride()[:2]),
        torch.get_num_threads(),
    )
    for name, number in zip(NUMBERS, numbers, strict=True):
        setattr(arguments, name, number)
    arguments.scale = scale * math.log2(math.e)


def _alike(new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both with the same strides and dense heads."""
    key, value = new
    if key.stride() == value.stride() and key.stride(2) == 1:
        return key, value
    return key.contiguous(), value.contiguous()
