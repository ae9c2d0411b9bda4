from typing import Any

import pytest
import torch
from stream_kernels import raise_on_nan, reference, uniforms
from stream_kernels.gpu.sample import sample_cuda
from torch import Tensor

from tests.kernels.cases import chi_square_limit
from tests.kernels.triton_forms.device import DEVICE

SETTINGS = [
    pytest.param({"temperature": 0.0}, id="greedy"),
    pytest.param({"temperature": 1.0}, id="plain"),
    pytest.param({"temperature": 0.7, "top_k": 50}, id="top-k"),
    pytest.param({"temperature": 1.3, "top_p": 0.9}, id="top-p"),
    pytest.param({"temperature": 0.7, "top_k": 20, "top_p": 0.5}, id="top-k-p"),
]


def draw(logits: Tensor, points: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "suppress": None, "penalized": None}
    options |= settings
    for name in ("suppress", "penalized"):
        if options[name] is not None:
            options[name] = options[name].to(DEVICE)
    tokens, logps = sample_cuda(logits.to(DEVICE), points.to(DEVICE), **options)
    return tokens.cpu(), logps.cpu()


def points_of(num_rows: int) -> Tensor:
    return uniforms(torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64))


# Blocks hold 1024 columns and a program four of them.
@pytest.mark.parametrize(
    ("vocab_size", "dtype", "spread"),
    [
        pytest.param(1, torch.float32, 1.0, id="one"),
        pytest.param(77, torch.float16, 3.0, id="part-of-a-block"),
        pytest.param(1024, torch.bfloat16, 1.0, id="a-block"),
        pytest.param(1025, torch.float32, 6.0, id="a-block-and-one"),
        pytest.param(4100, torch.bfloat16, 2.0, id="two-programs"),
    ],
)
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_and_logps_are_the_references(
    vocab_size: int, dtype: torch.dtype, spread: float, settings: Any
) -> None:
    torch.manual_seed(vocab_size)
    logits = (torch.randn(2, vocab_size) * spread).to(dtype)
    tokens, logps = draw(logits, points_of(2), **settings)
    expected, expected_logps = reference.sample(logits, points_of(2), **settings)
    assert tokens.tolist() == expected.tolist()
    assert (logps - expected_logps).abs().max() < 1e-5


@pytest.mark.parametrize("settings", SETTINGS)
def test_suppressed_and_penalized_logits_choose_alone(settings: Any) -> None:
    torch.manual_seed(0)
    logits, penalized = torch.randn(2, 1500), torch.randn(2, 1500) * 4
    logits[:, 7], penalized[:, 9] = 60.0, 60.0
    suppress = torch.tensor([7, 9, 1499])
    for others in (None, penalized):
        options: dict[str, Any] = {"suppress": suppress, "penalized": others, **settings}
        tokens, logps = draw(logits, points_of(2), **options)
        expected, expected_logps = reference.sample(logits, points_of(2), **options)
        assert tokens.tolist() == expected.tolist()
        assert (logps - expected_logps).abs().max() < 2e-5


def test_samples_follow_the_tempered_distribution() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8)
    tokens, _ = draw(logits.repeat(100, 1), points_of(100), temperature=0.7)
    expected = 100 * torch.softmax(logits.double() / 0.7, dim=0)
    common = expected >= 5
    counts = torch.bincount(tokens, minlength=8)
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic < chi_square_limit(int(common.sum()))


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_that_cannot_be_sampled_come_back_as_nan(settings: Any) -> None:
    logits = torch.randn(5, 2500)
    logits[1, 7], logits[2], logits[3, 1500] = torch.nan, -torch.inf, torch.inf
    logits[4, :2499] = -torch.inf
    tokens, logps = draw(logits, points_of(5), **settings)
    assert torch.isnan(logps).tolist() == [False, True, True, True, False]
    assert tokens.min() >= 0 and tokens[4] == 2499
    with pytest.raises(FloatingPointError, match=r"rows \[1, 2, 3\]"):
        raise_on_nan(logps)


def test_the_outermost_uniforms_stay_inside_the_support() -> None:
    logits = torch.full((2, 3000), -torch.inf)
    logits[:, 1500:1601] = torch.randn(2, 101)
    points = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for settings in ({"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.9999999}):
        tokens, _ = draw(logits, points, **settings)
        assert tokens.tolist() == [1500, 1600]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 3000)
    tokens, logps = draw(logits, points_of(4), temperature=0.8, top_p=0.9)
    alone = draw(logits[2:3], points_of(4)[2:3], temperature=0.8, top_p=0.9)
    assert alone[0] == tokens[2] and alone[1] == logps[2]
