"""The benchmarks' own arithmetic, and one small run of them; no time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.benchmarks import baselines, harness, whole

K, TOKENS = 10, 150


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the next calls of `timed` take, in order."""
    planned: list[float] = []
    monkeypatch.setattr(harness, "timed", lambda work: (work(), planned.pop(0)))
    monkeypatch.setattr(harness, "reset_peak", lambda: None)
    yield planned
    assert planned == []


def test_a_ratio_is_the_median_of_the_rounds_ratios(seconds: list[float]) -> None:
    """Rounds (a, b) of (1, 2), (10, 30), (100, 100): ratios 2, 3, 1; medians 10 and 30."""
    seconds += [7.0, 7.0, 1.0, 2.0, 30.0, 10.0, 100.0, 100.0]  # the first two warm up
    results = harness.compare({"a": list, "b": list}, rounds=3, subject="a")
    assert results["times_slower_than_a"]["b"] == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_variants_alternate_their_order() -> None:
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    harness.compare(variants, rounds=2, subject="a")
    assert "".join(order[3:]) == "abccba"


def test_seconds_and_parts_are_per_unit(seconds: list[float]) -> None:
    seconds += [0.0, 0.0, 8.0, 6.0]
    results = harness.compare(
        {"a": lambda: {"half": 4.0}, "b": lambda: {"half": 3.0}},
        rounds=1,
        subject="a",
        units={"a": 4},
    )
    assert results["median_seconds"] == {"a": 2.0, "b": 6.0}
    assert results["parts"]["half"]["times_slower_than_a"]["b"]["median"] == 3.0


def test_an_optional_variant_that_raises_is_left_out_and_named() -> None:
    def broken() -> None:
        raise RuntimeError("no cache")

    variants = {"a": list, "b": broken, "c": list}
    results = harness.compare(variants, rounds=2, subject="a", optional=("b",))
    assert results["not_measured"] == {"b": "RuntimeError: no cache"}
    assert set(results["times_slower_than_a"]) == {"c"}
    with pytest.raises(RuntimeError):
        harness.compare(variants, rounds=2, subject="a")


def test_memory_that_was_freed_before_counts_again() -> None:
    """Without malloc_trim a resident arena hid the peak of what ran next in it."""
    if torch.cuda.is_available():
        pytest.skip("the peak is the allocator's own on a GPU")

    def work() -> list[bytearray]:
        return [bytearray(b"x" * 60_000) for _ in range(500)]

    pins = work()[::10]  # between what is freed, which therefore stays in the arena
    harness.reset_peak()
    work()
    assert len(pins) == 50
    assert 20 * 2**20 < harness.peak_bytes() < 60 * 2**20


def test_end_to_end_measures_every_part_in_one_run() -> None:
    """On two questions at once; the results so far are kept after each round."""
    kept: list[dict[str, Any]] = []
    results = whole.end_to_end("tiny", rounds=1, questions=2, keep=kept.append)
    assert kept == [results]
    assert json.loads(harness.rendered("end_to_end", results))["clock"] in {
        "process_time",
        "perf_counter",
    }
    names = {"ancestor", "nrs", "nrs_best", "continuous"}
    missing = set() if baselines.RETURNS_ALL_ROWS else {"continuous"}
    assert set(results["not_measured"]) == missing
    names -= missing
    for table in (results, results["parts"]["sampling"], results["parts"]["scoring"]):
        assert set(table["times_slower_than_engine"]) == names
        assert set(table["times_slower_than_engine_single"]) == names
        assert set(table["median_seconds"]) == names | {"engine", "engine_single"}
    assert set(results["peak_extra_mib"]) == names | {"engine", "engine_single"}
    assert results["max_logp_difference"] < 1e-4
    tokens = 2 * (630 + K * (TOKENS - 1))
    assert results["expected_language_model_tokens"] == tokens
    head_rows = 2 * K * TOKENS  # the first token of each answer is drawn from logits of its own
    assert results["instruct"] == results["reward"]
    assert results["reward"] == {
        "images": 2,
        "language_model_tokens": tokens,
        "head_rows": head_rows,
    }


def test_counts_are_exact_for_one_question() -> None:
    results = whole.counts("tiny")
    assert results["instruct"]["images"] == results["reward"]["images"] == 1
    assert results["instruct"]["language_model_tokens"] == 630 + K * (TOKENS - 1)


@pytest.mark.skipif(
    not baselines.RETURNS_ALL_ROWS, reason="this transformers returns one answer to a question"
)
def test_continuous_batching_sees_the_images() -> None:
    """At temperature 1 its log-probs are those of the whole model on the same ids."""
    setting = whole.set_up("tiny", k=3, answer_tokens=5, questions=2)
    answers, logps = setting.continuous.generate(
        setting.prompts, 3, 5, return_logprobs=True, temperature=1.0
    )
    assert logps is not None
    for prompt, ids, own in zip(setting.prompts, answers.split(3), logps.split(3)):
        truth = baselines.batched_score(setting.hf, prompt, ids)
        assert (own - truth).abs().max() < 1e-4
    assert 0 < setting.continuous.language_model_tokens < 2 * (630 + 3 * 6)
