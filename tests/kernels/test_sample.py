from typing import Any

import pytest
import torch
from stream_kernels import raise_on_nan, reference, sample, uniforms
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.kernels.cases import chi_square_limit

SETTINGS = [
    pytest.param({"temperature": 0.0}, id="greedy"),
    pytest.param({"temperature": 1.0}, id="plain"),
    pytest.param({"temperature": 0.7}, id="tempered"),
    pytest.param({"temperature": 0.7, "top_k": 50}, id="top-k"),
    pytest.param({"temperature": 1.3, "top_p": 0.9}, id="top-p"),
    pytest.param({"temperature": 0.7, "top_k": 20, "top_p": 0.5}, id="top-k-p"),
    pytest.param({"temperature": 1.0, "top_k": 1, "top_p": 0.01}, id="narrow"),
]


def draws(num_rows: int, seed: int = 0) -> Tensor:
    return uniforms(torch.arange(num_rows), torch.full((num_rows,), seed))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 129, 5000, 32_000])
def test_tokens_and_logps_are_the_references(
    vocab_size: int, dtype: torch.dtype, settings: Any
) -> None:
    torch.manual_seed(vocab_size)
    for spread in (0.1, 5.0):
        logits = (torch.randn(24, vocab_size) * spread).to(dtype)
        tokens, logps = sample(logits, draws(24), **settings)
        expected, _ = reference.sample(logits, draws(24), **settings)
        assert tokens.tolist() == expected.tolist()
        exact = torch.log_softmax(logits.double(), dim=1)[range(24), tokens]
        assert logps.dtype == torch.float32
        assert (logps - exact).abs().max() <= worst_logp(logits, tokens)


def worst_logp(logits: Tensor, tokens: Tensor) -> float:
    """What a log-prob may be off: never more than torch's own float32 log_softmax, and beside that
    half a unit in the last place of the numbers it is the difference of.

    The rule holds on any processor: how many partial sums torch keeps decides what its own is off.
    """
    exact = torch.log_softmax(logits.double(), dim=1)[range(len(tokens)), tokens]
    naive = torch.log_softmax(logits.float(), dim=1)[range(len(tokens)), tokens]
    largest = max(logits.abs().max().item(), exact.abs().max().item())
    rounding = largest * torch.finfo(torch.float32).eps
    return min((naive - exact).abs().max().item(), 1e-6) + rounding


def hf_probabilities(logits: Tensor, settings: Any) -> Tensor:
    """transformers' processors on one row, in float64."""
    scores = TemperatureLogitsWarper(settings["temperature"])(None, logits[None].double())
    if settings.get("top_k"):
        scores = TopKLogitsWarper(settings["top_k"])(None, scores)
    if settings.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)
    return torch.softmax(scores, dim=-1)[0]


@pytest.mark.parametrize("settings", SETTINGS[2:])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_every_token_has_the_share_that_transformers_gives_it(settings: Any, spread: float) -> None:
    """Uniforms just inside both ends of each kept token's interval must give that token."""
    torch.manual_seed(3)
    logits = torch.randn(2999) * spread
    probs = hf_probabilities(logits, settings)
    kept = (probs > 1e-5).nonzero()[:, 0]  # wider than float32's error in the ends
    ends = probs.cumsum(0)[kept]
    inset = 0.05 * probs[kept]
    for points in (ends - probs[kept] + inset, ends - inset):
        tokens, _ = sample(logits.expand(len(kept), -1), points, **settings)
        assert tokens.tolist() == kept.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_samples_follow_the_tempered_distribution(temperature: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(200)
    tokens, _ = sample(logits.expand(40_000, -1), draws(40_000), temperature=temperature)
    expected = 40_000 * torch.softmax(logits.double() / temperature, dim=0)
    counts = torch.bincount(tokens, minlength=200)
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(199)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_rows_token_does_not_depend_on_its_neighbours(settings: Any) -> None:
    torch.manual_seed(2)
    logits = torch.randn(67, 32_000) * 3
    logits[5::7] *= 10  # neighbours of another kind
    tokens, logps = sample(logits, draws(67), **settings)
    for rows in ([0], [66], [5, 6], list(range(30, 50))):
        alone = sample(logits[rows], draws(67)[rows], **settings)
        assert torch.equal(alone[0], tokens[rows])
        assert torch.equal(alone[1], logps[rows])


def test_ties_with_the_kth_token_all_stay() -> None:
    """Of 400 blocks each holds one of the tied values: no choice of k blocks has them all."""
    logits = torch.zeros(1, 25_600)
    tied = torch.arange(0, 25_600, 64)
    logits[0, tied] = 9.0
    points = (torch.arange(400) + 0.5) / 400
    tokens, _ = sample(logits.expand(400, -1), points.double(), temperature=1.0, top_k=7)
    assert tokens.tolist() == tied.tolist()


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    assert sample(logits, draws(2), temperature=0.0)[0].tolist() == [1, 0]


def test_tokens_rarer_than_float32_can_tell_are_reached() -> None:
    logits = torch.zeros(2, 1000)
    logits[:, -1] = -25.0  # 1.4e-14 of the mass
    points = torch.tensor([1 - 1e-15, 1 - 1e-13], dtype=torch.float64)
    tokens, _ = sample(logits, points, temperature=1.0)
    assert tokens.tolist() == [999, 998]


def test_the_outermost_uniforms_stay_inside_the_support() -> None:
    logits = torch.full((3, 1000), -torch.inf)
    logits[:, 300:701] = torch.randn(3, 401)
    points = torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for temperature, top_p in ((1.0, 1.0), (0.9, 0.99)):
        tokens, _ = sample(logits, points, temperature=temperature, top_p=top_p)
        assert tokens.min() >= 300 and tokens.max() <= 700


@pytest.mark.parametrize("settings", SETTINGS)
def test_suppressed_tokens_never_come_and_keep_their_share_of_the_logp(settings: Any) -> None:
    torch.manual_seed(4)
    logits = torch.randn(50, 500)
    logits[:, 7] = 60.0  # so likely that all else underflows unless it is taken out first
    suppress = torch.tensor([7, 8, 499])
    tokens, logps = sample(logits, draws(50), suppress=suppress, **settings)
    expected, _ = reference.sample(logits, draws(50), suppress=suppress, **settings)
    assert tokens.tolist() == expected.tolist()
    assert not torch.isin(tokens, suppress).any()
    assert logps.max() < -50


@pytest.mark.parametrize("settings", SETTINGS)
def test_penalized_logits_choose_and_the_models_own_are_scored(settings: Any) -> None:
    torch.manual_seed(5)
    logits, penalized = torch.randn(20, 700), torch.randn(20, 700) * 4
    tokens, logps = sample(logits, draws(20), penalized=penalized, **settings)
    assert torch.equal(tokens, sample(penalized, draws(20), **settings)[0])
    exact = torch.log_softmax(logits.double(), dim=1)[range(20), tokens]
    assert (logps - exact).abs().max() <= worst_logp(logits, tokens)


@pytest.mark.parametrize(("vocab_size", "limit"), [(32_000, 2e-6), (152_064, 4e-6)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logps_stay_exact_over_large_vocabularies(
    vocab_size: int, limit: float, temperature: float
) -> None:
    """They carried the error of torch's float32 softmax: 8e-6 and 3e-5 with 8 lanes."""
    torch.manual_seed(7)
    for spread in (0.1, 3.0):
        logits = torch.randn(16, vocab_size) * spread
        tokens, logps = sample(logits, draws(16), temperature=temperature)
        exact = torch.log_softmax(logits.double(), dim=1)[range(16), tokens]
        assert (logps - exact).abs().max() <= limit


def test_columns_beyond_the_vocabulary_do_not_exist() -> None:
    torch.manual_seed(6)
    logits = torch.randn(9, 320)
    logits[:, 300:] = torch.nan
    got = sample(logits, draws(9), temperature=1.0, vocab_size=300)
    expected = sample(logits[:, :300].contiguous(), draws(9), temperature=1.0)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", [sample, reference.sample], ids=["fast", "reference"])
def test_rows_that_cannot_be_sampled_are_named(form: Any, settings: Any) -> None:
    logits = torch.randn(300, 2000)
    logits[3, 5], logits[141, 9], logits[299] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(FloatingPointError, match=r"rows \[3, 141, 299\]"):
        form(logits, draws(300), **settings)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", [sample, reference.sample], ids=["fast", "reference"])
def test_sound_logits_with_nothing_left_to_sample_are_named(form: Any, settings: Any) -> None:
    logits, penalized = torch.randn(3, 40), torch.randn(3, 40)
    penalized[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        form(logits, draws(3), penalized=penalized, **settings)
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1, 2\]"):
        form(logits, draws(3), suppress=torch.arange(40), **settings)


def test_nan_logps_read_back_from_a_device_are_named() -> None:
    raise_on_nan(torch.tensor([-1.0, -torch.inf]))
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        raise_on_nan(torch.tensor([-1.0, torch.nan]))


def test_no_rows_give_no_tokens() -> None:
    tokens, logps = sample(torch.empty(0, 50), draws(0), temperature=1.0)
    assert tokens.shape == logps.shape == (0,)
