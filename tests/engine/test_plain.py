"""The plain path against the shared one: the same model, answers and log-probs."""

from __future__ import annotations

import pytest
import torch

from stream_engine.engine import (
    Generation,
    RequestFailure,
    RowRequest,
    ScoredContinuations,
    ScoreRequest,
)
from stream_engine.engine.requests import GenerateRequest
from tests.engine.conftest import ask


@pytest.fixture
def engines(make_engine):
    """Two engines around one checkpoint, the second told that it cannot share a prefix."""

    def make(**values):
        shared, plain = make_engine(**values), make_engine(**values)
        plain.model.shares_prefix = False
        plain.model.set_attention(plain.model.own_attention)
        return shared, plain

    return make


def rows_of(engine, requests):
    results = {result.key: result for result in engine.generate(requests)}
    assert all(isinstance(result, Generation) for result in results.values())
    return {key: result.rows for key, result in results.items()}


def assert_same_rows(shared, plain):
    assert plain.keys() == shared.keys()
    for key, rows in shared.items():
        for one, other in zip(rows, plain[key], strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert one.end_token_id == other.end_token_id
            torch.testing.assert_close(one.token_logps, other.token_logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_rows", [None, 3])
def test_sampled_answers_are_the_same(engines, max_rows):
    """Rows end at different times, by the end token or their own limits."""
    shared, plain = engines(max_rows=max_rows, repetition_penalty=1.2, top_p=0.9)
    for engine in (shared, plain):
        engine.runner.stop_token_ids |= set(range(100, 160))  # so that some rows end early
    requests = ask(shared, 3, rows=5)
    expected = rows_of(shared, requests)
    lengths = {len(row.token_ids) for rows in expected.values() for row in rows}
    assert len(lengths) > 2
    assert_same_rows(expected, rows_of(plain, requests))


def test_rows_with_tokens_of_their_own_are_the_same(engines):
    shared, plain = engines()
    [request] = ask(shared, 1)
    suffixes = ((5, 6, 7), (8,), (9, 10, 11), ())
    rows = tuple(RowRequest(seed, own, seed + 2) for seed, own in enumerate(suffixes))
    requests = [GenerateRequest("q", request.prompt, rows)]
    assert_same_rows(rows_of(shared, requests), rows_of(plain, requests))


def test_scores_and_next_tokens_are_the_same(engines):
    shared, plain = engines(max_rows=2)
    continuations = ((5, 6, 7, 8), (9,), (10, 11), (12, 13, 14))
    requests = [ScoreRequest(r.key, r.prompt, continuations) for r in ask(shared, 3)]
    for one, other in zip(shared.score(requests), plain.score(requests), strict=True):
        assert isinstance(other, ScoredContinuations)
        assert one.key == other.key
        for a, b in zip(one.token_logps, other.token_logps, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    watched = [20, 30, 40]
    pairs = zip(
        shared.next_token_logps(requests, watched),
        plain.next_token_logps(requests, watched),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.logps, other.logps, atol=1e-5, rtol=0)


def test_the_prompt_runs_once_however_many_rows(engines):
    _, plain = engines()
    [request] = ask(plain, 1, rows=6)
    list(plain.generate([request]))
    assert plain.counters["prompts"] == 1
    assert plain.counters["prompt_tokens"] == len(request.prompt)


def test_out_of_memory_goes_on_with_fewer_rows(engines, monkeypatch):
    shared, plain = engines()
    requests = ask(shared, 2, rows=4)
    expected = rows_of(shared, requests)
    extend_cached = plain.model.extend_cached

    def at_most_two(embeds, positions, cache):
        if len(embeds) > 2:
            raise torch.OutOfMemoryError("no room for three rows")
        return extend_cached(embeds, positions, cache)

    monkeypatch.setattr(plain.model, "extend_cached", at_most_two)
    assert_same_rows(expected, rows_of(plain, requests))
    assert plain.runner.budget.rows <= 2


def test_a_question_that_fails_fails_alone(engines, monkeypatch):
    _, plain = engines()
    requests = ask(plain, 3)
    encode_images = plain.model.encode_images

    def broken(prompts):
        if prompts[0] is requests[0].prompt:
            raise RuntimeError("a bad picture")
        return encode_images(prompts)

    monkeypatch.setattr(plain.model, "encode_images", broken)
    first, *others = plain.generate(requests)
    assert first == RequestFailure("0", "forward_error", "a bad picture")
    assert [type(result) for result in others] == [Generation, Generation]


def test_a_lost_device_fails_the_call_and_not_its_questions(engines, monkeypatch):
    """Each question of this call and of all later ones failed alone, with the same error."""
    _, plain = engines()

    def lost(prompts):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(plain.model, "encode_images", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(plain.generate(ask(plain, 3)))


def test_nan_is_a_failure_by_name(engines):
    _, plain = engines()
    plain.runner.head_weight = torch.full_like(plain.model.lm_head.weight, float("nan"))
    [result] = plain.generate(ask(plain, 1))
    assert result.reason == "nonfinite_logits"
