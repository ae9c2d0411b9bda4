"""`prefix_attention` by the C of this folder: one call a layer. Legend as there."""

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
    """The C function, or None."""
    library = compiled.library()
    if library is None:
        return None
    function = library.decode_attention
    function.argtypes = [ctypes.POINTER(Arguments), ctypes.c_void_p]
    function.restype = None
    return function


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
    function = _function()
    assert function is not None
    spans, group_rows, slots, lengths = (part.contiguous() for part in layout)
    out = torch.empty(query.shape, dtype=query.dtype)
    new_key, new_value = (None, None) if new is None else _alike(new)
    arguments = Arguments(
        query.data_ptr(),
        prefix[0].data_ptr(),
        prefix[1].data_ptr(),
        None if new_key is None else new_key.data_ptr(),
        None if new_value is None else new_value.data_ptr(),
        suffix[0].data_ptr(),
        suffix[1].data_ptr(),
        out.data_ptr(),
        spans.data_ptr(),
        group_rows.data_ptr(),
        slots.data_ptr(),
        lengths.data_ptr(),
        *group_rows.shape,
        query.shape[1],
        prefix[0].shape[0],
        query.shape[2],
        query.dtype == torch.bfloat16,
        *query.stride()[:2],
        prefix[0].stride(0),
        *suffix[0].stride()[:2],
        *((0, 0) if new_key is None else new_key.stride()[:2]),
        torch.get_num_threads(),
        scale * math.log2(math.e),
    )
    function(ctypes.byref(arguments), compiled.parallel())
    return out


def _alike(new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both with the same strides and dense heads."""
    key, value = new
    if key.stride() == value.stride() and key.stride(2) == 1:
        return key, value
    return key.contiguous(), value.contiguous()
