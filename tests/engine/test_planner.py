"""The engine follows its memory plan, and a rehearsal changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stream_engine.engine import Engine, ScoreRequest, share_device
from stream_engine.engine.memory import (
    wanted_bytes,
)
from stream_engine.errors import ConfigError
from tests.engine.conftest import ask, free


def drawn(results) -> dict[str, list[list[int]]]:
    return {r.key: [row.token_ids for row in r.rows] for r in results}


def test_tight_memory_lowers_rows_and_changes_no_answer(make_engine, monkeypatch):
    roomy = make_engine(max_rows=24, max_tokens=256)
    expected = drawn(roomy.generate(ask(roomy, 8)))
    needed = wanted_bytes(roomy.planner.demand())
    free(monkeypatch, needed // 3)
    tight = make_engine(max_rows=24, max_tokens=256)
    assert tight.planner.plan.confirmed
    assert 1 <= tight.runner.budget.rows == tight.planner.plan.rows < roomy.planner.plan.rows == 24
    assert tight.runner.budget.tokens < roomy.runner.budget.tokens == 256
    assert drawn(tight.generate(ask(tight, 8))) == expected
    assert tight.describe()["memory"]["available"] == needed // 3


def test_no_memory_is_a_setting_to_change(make_engine, monkeypatch):
    free(monkeypatch, 10_000)
    with pytest.raises(ConfigError, match="are free"):
        make_engine()


def test_engines_side_by_side_stay_within_what_is_free(make_engine, monkeypatch):
    bounds = {"max_rows": 64, "max_tokens": 256, "max_new_tokens": 200}
    sampler, judge, scorer = (make_engine(**bounds) for _ in range(3))
    scorer.planner.draws = False
    wants = [wanted_bytes(engine.planner.demand()) for engine in (sampler, judge, scorer)]
    together = wants[2] + (wants[0] + wants[1]) // 3
    free(monkeypatch, together)
    share_device([sampler, judge, scorer])
    plans = [engine.planner.plan for engine in (sampler, judge, scorer)]
    assert sum(plan.total for plan in plans) <= together
    assert plans[0].rows == plans[1].rows < 64
    assert (plans[2].rows, plans[2].prefill_tokens) == (0, scorer.planner.bounds[0])
    free(monkeypatch, 2 * sum(wants))
    share_device([sampler, judge, scorer])  # another model left: the bounds are back
    assert sampler.runner.budget.rows == 64


def test_an_engine_with_rows_in_flight_keeps_its_plan(make_engine, monkeypatch):
    busy, new = make_engine(max_rows=6), make_engine(max_rows=6)
    expected = drawn(new.generate(ask(new, 8)))
    free(monkeypatch, 2 * wanted_bytes(busy.planner.demand()))
    share_device([busy])
    before, answers = busy.planner.plan, busy.generate(ask(busy, 8))
    first = next(answers)
    assert busy.runner.is_busy
    share_device([busy, new])
    assert busy.planner.plan is before
    assert (
        new.planner.plan.available
        == 2 * wanted_bytes(busy.planner.demand()) - busy.planner.still_to_take()
    )
    assert drawn([first, *answers]) == expected
    assert not busy.runner.is_busy


def test_a_scoring_engine_that_is_asked_to_draw_plans_anew(make_engine):
    expected = make_engine()
    engine = make_engine()
    engine.planner.draws = False
    share_device([engine])
    assert engine.planner.plan.rows == 0
    assert drawn(engine.generate(ask(engine, 3))) == drawn(expected.generate(ask(expected, 3)))
    assert engine.planner.plan.rows > 0


def test_fewer_tokens_in_a_forward_score_the_same(make_engine, monkeypatch):
    engine = make_engine()
    requests = [ScoreRequest(r.key, r.prompt, ((5, 9, 200), (31,))) for r in ask(engine, 5)]
    expected = [r.token_logps for r in engine.score(requests)]
    free(monkeypatch, wanted_bytes(engine.planner.demand()) // 12)
    share_device([engine])
    assert engine.runner.budget.tokens < engine.planner.bounds[0]
    for got, wanted in zip((r.token_logps for r in engine.score(requests)), expected):
        for row, other in zip(got, wanted):
            assert row == pytest.approx(other, abs=1e-5)


def test_a_rehearsal_counts_nowhere_and_changes_no_answer(make_engine):
    plain, tried = make_engine(max_rows=12), make_engine(max_rows=12)
    for seed in (0, 1):
        tried.planner.rehearses, tried.planner.is_planned = True, False
        expected = drawn(plain.generate(ask(plain, 6, seed=seed)))
        assert drawn(tried.generate(ask(tried, 6, seed=seed))) == expected
    assert tried.planner.plan.confirmed
    assert tried.counters == plain.counters


def test_a_plan_that_does_not_hold_shrinks_until_it_does(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has less than it said: slabs of more than 41 slots run out of memory."""
    engine = make_engine(max_rows=160, max_tokens=2048)
    expected = drawn(make_engine().generate(ask(engine, 6)))
    free(monkeypatch, wanted_bytes(engine.planner.demand()))
    refused = []

    def refuse(module, args, kwargs):
        if engine.runner.cache.num_slots > 41:
            refused.append(engine.runner.cache.num_slots)
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    engine.planner.rehearses = True
    engine.planner.plan_memory()
    assert refused == sorted(refused, reverse=True)
    assert refused[0] == 161
    assert engine.planner.plan.confirmed
    assert 20 <= engine.planner.plan.rows <= 40
    assert drawn(engine.generate(ask(engine, 6))) == expected
    assert engine.runner.budget.scale == 1.0


def test_a_plan_that_could_not_be_tried_has_its_slabs_all_the_same(make_engine, monkeypatch):
    """A captured step pads with the last slot, which must not be one that a row may own."""
    engine = make_engine(max_rows=12)

    def broken(prompts, starts):
        raise ValueError("this tower takes no such picture")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "prefill", broken)
        engine.planner.rehearses = True
        engine.planner.plan_memory()
    assert not engine.planner.plan.confirmed
    assert engine.runner.cache.num_slots == engine.planner.plan.rows + 1
    assert len(drawn(engine.generate(ask(engine, 3)))) == 3


def test_a_model_that_runs_nothing_is_refused(make_engine):
    engine = make_engine()

    def refuse(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    engine.planner.rehearses, engine.planner.is_planned = True, False
    with pytest.raises(ConfigError, match="--tensor_parallel"):
        list(engine.generate(ask(engine, 1)))
