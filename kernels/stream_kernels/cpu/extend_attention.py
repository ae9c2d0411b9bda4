"""Attention of rows of new tokens over shared prefixes, by the C of this folder: one call a layer.

Legend: N packed tokens, Hq/Hkv query/key heads, D head size, T tokens of all prefixes, C chunks.
"""

import ctypes
import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from stream_kernels.cpu import compiled
from stream_kernels.forms import takes_triton

POINTERS = ("query", "key", "value", "prefix_key", "prefix_value", "out", "chunks")
NUMBERS = (
    *("num_chunks", "heads", "kv_heads", "size", "is_bfloat16"),
    *("query_token", "query_head", "key_token", "key_head", "prefix_head", "num_threads"),
)
MOST_SIZE = 256
Rows = tuple[tuple[int, tuple[int, int]], ...]
"""Tokens of each row, and its prefix: where that starts, and its length."""


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
    return compiled.function("extend_attention", Arguments, _agrees)


def _agrees(function: Any) -> bool:
    """Two rows, one of them over a prefix, in both formats."""
    generator = torch.Generator().manual_seed(0)
    rows = (70, (3, 66)), (9, (0, 0))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        query, key, value = (
            torch.randn(79, heads, 36, generator=generator).to(dtype) for heads in (4, 2, 2)
        )
        prefix_key, prefix_value = torch.randn(2, 2, 70, 36, generator=generator).to(dtype)
        given = query, key, value, prefix_key, prefix_value
        chunks = chunks_of(rows, 2)
        got, truth = _attend(function, *given, chunks, 0.2), _truth(*given, rows, 0.2)
        if not torch.allclose(got.float(), truth, atol=tolerance):
            return False
    return True


def _truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    rows: Rows,
    scale: float,
) -> Tensor:
    """What `extend_attention` computes, from float32 scores: [N, Hq, D]."""
    repeats = query.shape[1] // key.shape[1]
    outs, first = [], 0
    for count, (start, length) in rows:
        own, seen = slice(first, first + count), slice(start, start + length)
        keys, values = (
            torch.cat([prefix[:, seen], each[own].transpose(0, 1)], dim=1)
            .float()
            .repeat_interleave(repeats, dim=0)
            for prefix, each in ((prefix_key, key), (prefix_value, value))
        )
        scores = query[own].transpose(0, 1).float() @ keys.transpose(1, 2) * scale
        above = torch.ones(count, length + count).triu(length + 1).bool()
        weights = scores.masked_fill(above, -torch.inf).softmax(dim=-1)
        outs.append((weights @ values).transpose(0, 1))
        first += count
    return torch.cat(outs)


def serves(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> bool:
    """Whether `extend_attention` takes these: heads of up to 256 elements, one format, on CPU."""
    if takes_triton(query.device) or query.device.type != "cpu":
        return False
    size = query.shape[2]
    library = compiled.library()
    return (
        query.dtype in (torch.float32, torch.bfloat16)
        and all(part.dtype == query.dtype for part in (key, value, *prefix))
        and size <= MOST_SIZE
        and size % 2 == 0
        and query.stride(2) == key.stride(2) == 1
        and key.stride() == value.stride()
        and key.stride(0) % 2 == 0
        and prefix[0].stride()[1:] == (size, 1)
        and prefix[0].stride() == prefix[1].stride()
        and library is not None
        and query.shape[1] // key.shape[1] <= library.rows_of_a_chunk()
        and _function() is not None
    )


@lru_cache(maxsize=8)
def chunks_of(rows: Rows, repeats: int) -> Tensor:
    """How rows, one after the other, are worked on, by all layers of a step alike: int64 [C, 5].

    `repeats` query heads share a key head.
    """
    library = compiled.library()
    assert library is not None
    most = library.rows_of_a_chunk() // repeats
    chunks, first = [], 0
    for count, prefix in rows:
        pieces = -(-count // most)
        for piece in range(pieces):
            begin, end = (count * i // pieces for i in (piece, piece + 1))
            chunks.append((first + begin, end - begin, first, *prefix))
        first += count
    return torch.tensor(chunks, dtype=torch.int64).view(-1, 5)


def extend_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor],
    chunks: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Each token's attention to its row's prefix and the row's tokens up to itself: [N, Hq, D].

    query [N, Hq, D], key and value [N, Hkv, D], prefix a key and a value [Hkv, T, D], as `serves`
    takes them; `chunks` of `chunks_of`.
    """
    return _attend(_function(), query, key, value, *prefix, chunks, scale)


def _attend(
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    chunks: Tensor,
    scale: float,
) -> Tensor:
    out = torch.empty(query.shape, dtype=query.dtype)
    if len(chunks) == 0:
        return out
    given = query, key, value, prefix_key, prefix_value, out, chunks
    arguments = Arguments(
        *(each.data_ptr() for each in given),
        len(chunks),
        query.shape[1],
        key.shape[1],
        query.shape[2],
        query.dtype == torch.bfloat16,
        *query.stride()[:2],
        *key.stride()[:2],
        prefix_key.stride(0),
        torch.get_num_threads(),
        scale * math.log2(math.e),
    )
    function(ctypes.byref(arguments), compiled.parallel())
    return out
