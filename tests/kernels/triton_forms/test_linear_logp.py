from typing import Any

import pytest
import torch
from stream_kernels import reference
from stream_kernels.gpu.linear_logp import linear_logp_chunked, linear_logp_fused

from tests.kernels.triton_forms.device import DEVICE, DTYPES

SMALL_TILES: dict[str, Any] = {"block_n": 32, "block_v": 64, "block_d": 32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(
    "shape", [(1, 16, 1), (7, 40, 1000), (31, 64, 63), (33, 24, 257), (64, 32, 64)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [{}, {"biased": True, "logit_scale": 0.3, "softcap": 5.0}],
    ids=["plain", "bias-scale-softcap"],
)
def test_logps_match_float64(shape: Any, splits: Any, dtype: torch.dtype, options: Any) -> None:
    torch.manual_seed(0)
    num_tokens, size, vocab_size = shape
    hidden = torch.randn(num_tokens, size).to(dtype)
    weight = torch.randn(vocab_size, size).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,))
    bias = torch.randn(vocab_size).to(dtype) if options.get("biased") else None
    logit_scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    exact = torch.log_softmax(logits, dim=1)[range(num_tokens), targets]
    naive = reference.linear_logp(
        hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap
    )
    allowed = (naive - exact).abs().max() + 2e-5
    arguments = [tensor.to(DEVICE) for tensor in (hidden, weight, targets)]
    settings: dict[str, Any] = {
        "bias": None if bias is None else bias.to(DEVICE),
        "logit_scale": logit_scale,
        "softcap": softcap,
    }
    tiles: dict[str, Any] = {"splits": splits, **SMALL_TILES}
    fused = linear_logp_fused(*arguments, **(settings | tiles))
    assert (fused.cpu() - exact).abs().max() <= allowed
    assert (linear_logp_chunked(*arguments, **settings).cpu() - exact).abs().max() <= allowed


def test_token_tiles_in_several_groups_are_all_written() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(17 * 16 + 5, 8), torch.randn(70, 8)
    targets = torch.randint(70, (len(hidden),))
    exact = torch.log_softmax(hidden.double() @ weight.double().T, 1)[range(len(hidden)), targets]
    arguments = [tensor.to(DEVICE) for tensor in (hidden, weight, targets)]
    got = linear_logp_fused(*arguments, block_n=16, block_v=16, block_d=16)
    assert (got.cpu() - exact).abs().max() < 1e-5
    assert torch.equal(got, linear_logp_fused(*arguments, block_n=16, block_v=16, block_d=16))


def test_impossible_tokens_huge_logits_and_foreign_targets() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16) * 300, torch.randn(200, 16)
    bias = torch.zeros(200)
    bias[:128] = -torch.inf  # whole tiles
    targets = torch.tensor([130, 199, 150, -1, 200])
    arguments = [tensor.to(DEVICE) for tensor in (hidden, weight, targets)]
    got = linear_logp_fused(*arguments, bias=bias.to(DEVICE), **SMALL_TILES).cpu()
    exact = torch.log_softmax(hidden.double() @ weight.double().T + bias, dim=1)
    assert torch.isnan(got).tolist() == [False] * 3 + [True] * 2
    assert torch.allclose(got[:3].double(), exact[range(3), targets[:3]], rtol=1e-5, atol=1e-3)


def test_rows_that_the_copy_engine_cannot_read_are_refused() -> None:
    hidden, weight = torch.randn(2, 6), torch.randn(9, 6)
    with pytest.raises(ValueError, match="16-aligned"):
        linear_logp_fused(hidden, weight, torch.tensor([0, 1]))
