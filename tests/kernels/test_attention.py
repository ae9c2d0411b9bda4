from typing import Any

import pytest
import torch
from stream_kernels import attention_with_lse, merge_by_lse, reference
from torch import Tensor

from tests.kernels.cases import Recorder

FORMS = [attention_with_lse, reference.attention_with_lse]


def truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    lengths: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """In float64, over repeated keys; rows that see nothing are 0 and -inf. In another type this is
    the naive computation, whose error on this processor the kernels' is held against."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query.to(dtype) @ key.transpose(2, 3) * 0.3
    places = torch.arange(key.shape[2])
    seen = torch.ones(query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool)
    if causal:
        seen &= places <= places[:, None]
    if lengths is not None:
        seen &= (places < lengths[:, None])[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value, lse


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    "lengths", [None, torch.tensor([0, 200, 5])], ids=["all-keys", "key-lengths"]
)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        pytest.param(1, 1, False, id="one-key"),
        pytest.param(1, 130, False, id="decode"),
        pytest.param(33, 65, False, id="prefix"),
        pytest.param(31, 31, True, id="causal"),
        pytest.param(64, 64, True, id="causal-64"),
    ],
)
def test_outputs_and_log_sum_exps_match_float64(
    heads: Any, lengths: Any, queries: int, keys: int, causal: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads[0], queries, 24)
    key, value = torch.randn(2, 3, heads[1], keys, 24).unbind(0)
    exact_out, exact_lse = truth(query, key, value, causal, lengths)
    naive_out, naive_lse = truth(query, key, value, causal, lengths, torch.float32)
    for form in FORMS:
        out, lse = form(query, key, value, scale=0.3, causal=causal, key_lengths=lengths)
        assert out.dtype == lse.dtype == torch.float32
        assert (out - exact_out).abs().max() <= (naive_out - exact_out).abs().max() + 2e-6
        assert torch.equal(lse.isinf(), exact_lse.isinf())
        naive_error = (naive_lse - exact_lse).nan_to_num(0, 0, 0).abs().max()
        assert (lse - exact_lse).nan_to_num(0, 0, 0).abs().max() <= naive_error + 2e-6


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_no_worse_than_the_naive_form(causal: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 40, 64).bfloat16()
    key, value = torch.randn(2, 2, 2, 40, 64).bfloat16().unbind(0)
    exact, _ = truth(query, key, value, causal, None)
    out, lse = attention_with_lse(query, key, value, scale=0.3, causal=causal)
    naive = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=0.3, enable_gqa=True
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (out - exact).abs().max() <= (naive - exact).abs().max() + 4e-3


@pytest.mark.parametrize("form", FORMS, ids=["fast", "reference"])
def test_no_keys_give_nothing_to_merge(form: Any) -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 0, 8)
    out, lse = form(query, key, key, scale=1.0)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_keys_are_never_repeated() -> None:
    query, key = torch.randn(1, 28, 2, 64), torch.randn(1, 4, 3000, 64)
    with Recorder() as recorder:
        attention_with_lse(query, key, key, scale=0.1)
    assert recorder.largest_bytes < key.numel() * 4


def test_halves_merge_into_the_whole() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 5, 16)
    key, value = torch.randn(2, 2, 2, 90, 16).unbind(0)
    exact, _ = truth(query, key, value, False, None)
    naive, _ = truth(query, key, value, False, None, torch.float32)
    limit = (naive - exact).abs().max() + 2e-6
    for cut in (0, 1, 45, 90):
        first = attention_with_lse(query, key[:, :, :cut], value[:, :, :cut], scale=0.3)
        second = attention_with_lse(query, key[:, :, cut:], value[:, :, cut:], scale=0.3)
        assert (merge_by_lse(*first, *second) - exact).abs().max() <= limit
        assert (merge_by_lse(*second, *first) - exact).abs().max() <= limit


def test_merging_two_absent_sides_gives_zero() -> None:
    out, lse = torch.zeros(2, 3), torch.full((2,), -torch.inf)
    assert merge_by_lse(out, lse, out, lse).tolist() == out.tolist()


def test_merging_log_sum_exps_far_apart_keeps_the_larger_side() -> None:
    out_a, out_b, far = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([500.0, -500.0])
    assert merge_by_lse(out_a, far, out_b, -far).tolist() == [[1.0] * 3, [0.0] * 3]
