"""Questions of the next call in the rows that a call's last answers leave empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stream_engine.engine import Engine, Generation, RequestFailure, ScoreRequest
from stream_engine.engine.scheduler import EARLY_CALLS
from tests.engine.conftest import ask

COUNTED = ("prompt_tokens", "decode_tokens", "head_rows")


def rows_of(results: list[Generation | RequestFailure]) -> dict[str, list[list[int]]]:
    assert all(isinstance(result, Generation) for result in results), results
    return {r.key: [row.token_ids for row in r.rows] for r in results}


def is_empty(engine: Engine) -> bool:
    """Nothing is in flight, and every span and slot is free."""
    cache, scheduler = engine.runner.cache, engine.scheduler
    free = cache.spans.num_free == cache.spans.capacity
    slots = len(cache._free_slots) == cache.num_slots
    return free and slots and not (scheduler.groups or scheduler.batch or scheduler.ready)


@pytest.fixture
def two_calls(make_engine):
    """An engine whose answers differ in length, and six questions for two calls of it."""

    def make(**values):
        engine = make_engine(max_rows=8, max_new_tokens=24, **values)
        engine.runner.stop_token_ids |= set(range(100, 160))
        requests = ask(engine, 6)
        return engine, requests[:3], requests[3:]

    return make


def test_what_was_begun_early_is_handed_over_and_not_drawn_twice(two_calls):
    plain, first, second = two_calls()
    expected = [rows_of(list(plain.generate(part))) for part in (first, second)]
    engine, first, second = two_calls()
    got = [rows_of(list(engine.generate(first, ahead=second)))]
    begun = len(engine.scheduler.early)
    got.append(rows_of(list(engine.generate(second))))
    assert got == expected
    assert begun > 0
    assert {n: engine.counters[n] for n in COUNTED} == {n: plain.counters[n] for n in COUNTED}
    assert engine.counters["decode_steps"] < plain.counters["decode_steps"]
    assert is_empty(engine) and not engine.scheduler.early


def test_the_next_questions_are_read_only_when_rows_are_free(two_calls):
    engine, first, second = two_calls()
    finished: list[str] = []

    def watched() -> Iterator:
        assert finished or len(engine.scheduler.groups) >= 2, "read before the call's own"
        yield from second

    for result in engine.generate(first, ahead=watched()):
        finished.append(result.key)
    assert sorted(finished) == ["0", "1", "2"]


def test_a_finished_call_does_not_wait_for_the_next_ones_answers(two_calls):
    engine, first, second = two_calls()
    list(engine.generate(first, ahead=second))
    assert engine.scheduler.groups, "the next call's answers were drawn to their end"


def test_early_work_outlives_the_calls_between(two_calls):
    """A judge that shares the engine is asked between two shards."""
    engine, first, second = two_calls()
    list(engine.generate(first, ahead=second))
    others = ask(engine, 2, seed=1)
    expected = rows_of(list(two_calls()[0].generate(others)))
    assert rows_of(list(engine.generate(others))) == expected
    counted = engine.counters["prompt_tokens"]
    begun = len(engine.scheduler.early)
    assert rows_of(list(engine.generate(second[:begun]))) == rows_of(
        list(two_calls()[0].generate(second[:begun]))
    )
    assert engine.counters["prompt_tokens"] == counted


def test_work_that_nobody_asks_for_is_dropped_in_the_end(two_calls):
    engine, first, second = two_calls()
    list(engine.generate(first, ahead=second))
    for _ in range(EARLY_CALLS):
        assert engine.scheduler.early
        list(engine.generate(ask(engine, 1, seed=1)))
    list(engine.generate(ask(engine, 1, seed=1)))
    assert is_empty(engine) and not engine.scheduler.early


def test_another_seed_is_another_question(two_calls):
    engine, first, second = two_calls()
    list(engine.generate(first, ahead=second))
    reseeded = ask(engine, 6, seed=5)[3:]
    drawn = rows_of(list(engine.generate(reseeded)))
    assert drawn == rows_of(list(two_calls()[0].generate(reseeded)))


def test_a_call_that_is_given_up_leaves_nothing_behind(two_calls):
    """Spans and slots of a call that raised stayed taken, and the cache grew with every failure."""
    engine, first, second = two_calls()
    running = engine.generate(first, ahead=second)
    next(running)
    assert not is_empty(engine)
    running.close()
    assert is_empty(engine) and not engine.scheduler.early
    assert rows_of(list(engine.generate(first))) == rows_of(list(two_calls()[0].generate(first)))


def test_a_call_inside_another_disturbs_neither(two_calls):
    engine, first, second = two_calls()
    expected = rows_of(list(two_calls()[0].generate([*first, *second])))
    outer, inner = [], []
    for result in engine.generate(first):
        outer.append(result)
        if not inner:
            inner = list(engine.generate(second))
    assert rows_of([*outer, *inner]) == expected
    assert is_empty(engine)


def test_a_failure_of_early_work_is_told_when_its_turn_comes(two_calls):
    engine, first, second = two_calls()
    bad = next(r for r in second if r.prompt.vision)
    bad.prompt.vision[0][:] = float("nan")
    early = list(engine.generate(first, ahead=second))
    assert [type(result) for result in early] == [Generation] * 3
    later = {result.key: result for result in engine.generate(second)}
    assert isinstance(later[bad.key], RequestFailure)
    assert later[bad.key].reason == "nonfinite_logits"
    assert sum(isinstance(result, Generation) for result in later.values()) == 2
    assert is_empty(engine)


def test_out_of_memory_gives_early_work_up_first(two_calls, monkeypatch):
    engine, first, second = two_calls()
    expected = [rows_of(list(two_calls()[0].generate(part))) for part in (first, second)]
    forward, early_ids = engine.runner.prefill, {id(request.prompt) for request in second}

    def prefill(prompts, starts):
        if any(id(prompt) in early_ids for prompt in prompts) and engine.scheduler.early.call == 1:
            raise torch.OutOfMemoryError("no room for more")
        return forward(prompts, starts)

    monkeypatch.setattr(engine.runner, "prefill", prefill)
    assert rows_of(list(engine.generate(first, ahead=second))) == expected[0]
    assert engine.runner.budget.scale == 1.0, "the call's own questions had room"
    assert rows_of(list(engine.generate(second))) == expected[1]
    assert is_empty(engine)


def test_early_work_does_not_keep_scoring_out(two_calls):
    """With its prefixes in the cache there may be no room for the first prompt to score."""
    engine, first, second = two_calls()
    list(engine.generate(first, ahead=second))
    assert engine.scheduler.groups
    for _, length in list(engine.runner.cache.spans._free):
        engine.runner.cache.spans.allocate(length)
    engine.runner.cache.max_prefix_tokens = engine.runner.cache.spans.capacity
    prompt = min((request.prompt for request in first), key=len)
    results = list(engine.score([ScoreRequest("s", prompt, ((5, 9, 31),))]))
    assert [len(result.token_logps[0]) for result in results] == [3]
    assert not engine.scheduler.groups
