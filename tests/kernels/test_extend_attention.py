"""Attention of new tokens over prefixes, compiled: against float64, and what changes no bit."""

import pytest
import torch
from stream_kernels import forms
from stream_kernels.cpu import compiled, extend_attention
from torch import Tensor

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="needs AVX-512 and a C compiler")
ROWS = [(1, (3, 66)), (64, (3, 66)), (65, (70, 1)), (150, (0, 0)), (7, (10, 64))]
"""Tokens of each row, and its prefix: where that starts, and its length."""
NUM_TOKENS = sum(count for count, _ in ROWS)


def given(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        *((NUM_TOKENS, n, size) for n in (heads, kv_heads, kv_heads)),
        *[(kv_heads, 80, size)] * 2,
    )
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attended(parts: list[Tensor], rows: list, scale: float) -> Tensor:
    query, key, value, *prefix = parts
    pair = prefix[0], prefix[1]
    assert extend_attention.serves(query, key, value, pair)
    chunks = extend_attention.chunks_of(tuple(rows), query.shape[1] // key.shape[1])
    return extend_attention.extend_attention(query, key, value, pair, chunks, scale=scale)


def exact(parts: list[Tensor], scale: float) -> Tensor:
    query, key, value, prefix_key, prefix_value = (part.double() for part in parts)
    repeats, first, outs = query.shape[1] // key.shape[1], 0, []
    for count, (start, length) in ROWS:
        for token in range(first, first + count):
            own, seen = slice(first, token + 1), slice(start, start + length)
            keys = torch.cat([prefix_key[:, seen], key[own].transpose(0, 1)], dim=1)
            values = torch.cat([prefix_value[:, seen], value[own].transpose(0, 1)], dim=1)
            keys, values = (each.repeat_interleave(repeats, dim=0) for each in (keys, values))
            weights = (torch.einsum("hd,hnd->hn", query[token], keys) * scale).softmax(dim=-1)
            outs.append(torch.einsum("hn,hnd->hd", weights, values))
        first += count
    return torch.stack(outs)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (64, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("size", [2, 36, 64, 80, 128, 256])
def test_any_head_size_matches_float64(heads: tuple[int, int], size: int) -> None:
    scale = size**-0.5
    for dtype, atol, rtol in ((torch.float32, 3e-6, 0.0), (torch.bfloat16, 1e-5, 2**-8)):
        parts = given(*heads, size, dtype)
        got = attended(parts, ROWS, scale)
        assert got.dtype == dtype
        assert torch.allclose(got.double(), exact(parts, scale), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whatever_rows_and_threads_there_are(dtype: torch.dtype) -> None:
    parts = given(6, 2, 64, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out = attended(parts, ROWS, 0.125)
        torch.set_num_threads(3)
        assert torch.equal(attended(parts, ROWS, 0.125), out)
    finally:
        torch.set_num_threads(threads)
    own = slice(65, 130)
    alone = attended([*(part[own] for part in parts[:3]), *parts[3:]], ROWS[2:3], 0.125)
    assert torch.equal(alone, out[own])


def test_tokens_that_lie_apart_and_no_tokens_at_all() -> None:
    parts = given(4, 2, 64, torch.bfloat16)
    out = attended(parts, ROWS, 0.125)
    heads_first = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts[:3]]
    assert torch.equal(attended([*heads_first, *parts[3:]], ROWS, 0.125), out)
    assert attended([*(part[:0] for part in parts[:3]), *parts[3:]], [], 0.125).shape == (0, 4, 64)


def test_what_it_does_not_take_is_left_to_torch() -> None:
    query, key, value, prefix_key, prefix_value = given(4, 2, 64, torch.float32)
    prefix = prefix_key, prefix_value
    serves = extend_attention.serves
    assert serves(query, key, value, prefix)
    assert not serves(query.half(), key.half(), value.half(), (prefix_key.half(),) * 2)
    assert not serves(query.bfloat16(), key, value, prefix)
    assert not serves(query.repeat(1, 40, 1), key, value, prefix)  # 80 heads share a key head
    assert not serves(*(each[..., ::2] for each in (query, key, value)), prefix)


def test_other_devices_and_rehearsals_of_them_are_left_to_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine with a GPU compiled the C files at its first prompt, and a rehearsal ran them in
    place of the kernels that it is to rehearse."""
    parts = given(4, 4, 64, torch.float32)
    monkeypatch.setattr(forms, "INTERPRETED", True)
    assert not extend_attention.serves(parts[0], parts[1], parts[2], (parts[3], parts[4]))
    monkeypatch.setattr(compiled, "library", lambda: pytest.fail("it is compiled"))
    query, key, value, *prefix = (part.to("meta") for part in parts)
    assert not extend_attention.serves(query, key, value, (prefix[0], prefix[1]))
