from typing import Any

import pytest
import torch
from stream_kernels import reference
from stream_kernels.gpu.attention import attention_with_lse_cuda

from tests.kernels.triton_forms.device import DEVICE, DTYPES, OUTPUT_ERROR


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2, 16), (6, 2, 24)], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(1, 1, False), (3, 65, False), (17, 63, False), (65, 65, True), (16, 16, True)],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "key-lengths"])
def test_outputs_and_log_sum_exps_match_the_reference(
    dtype: torch.dtype, heads: Any, queries: int, keys: int, causal: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads[0], queries, heads[2]).to(dtype)
    key, value = torch.randn(2, 3, heads[1], keys + 9, heads[2]).to(dtype)[:, :, :, :keys].unbind(0)
    lengths = torch.tensor([0, keys, (keys + 1) // 2]) if masked else None
    exact_out, exact_lse = reference.attention_with_lse(
        query.float(), key.float(), value.float(), scale=0.3, causal=causal, key_lengths=lengths
    )
    out, lse = attention_with_lse_cuda(
        query.to(DEVICE),
        key.to(DEVICE),
        value.to(DEVICE),
        scale=0.3,
        causal=causal,
        key_lengths=None if lengths is None else lengths.to(DEVICE),
    )
    assert (out.cpu() - exact_out).abs().max() < OUTPUT_ERROR[dtype]
    assert torch.equal(lse.cpu().isinf(), exact_lse.isinf())
    assert (lse.cpu() - exact_lse).nan_to_num(0, 0, 0).abs().max() < 1e-5


@pytest.mark.skipif(DEVICE == "cpu", reason="70,000 programs take the interpreter minutes")
def test_more_rows_than_the_second_axis_of_a_grid_holds() -> None:
    query, key, value = torch.randn(3, 35_000, 2, 3, 16, device=DEVICE).unbind(0)
    out, _ = attention_with_lse_cuda(query, key, value, scale=0.3, causal=True, key_lengths=None)
    exact, _ = reference.attention_with_lse(query, key, value, scale=0.3, causal=True)
    assert (out - exact).abs().max() < OUTPUT_ERROR[torch.float32]
