"""Models that babble: a run completes, and every answer is accounted for."""

from __future__ import annotations

import pytest

from stream_engine.pipelines.base import Pipeline
from stream_engine.records import SampleRollouts
from tests.pipelines.conftest import (
    judged,
    load_engines,
    make_samples,
    put_words,
    rollouts_of,
)

OPTIONS = {
    "divide_and_conquer": {"text_max_new_tokens": 12, "text_temperature": 1.0},
    "llava_critic": {"critic_max_new_tokens": 12, "critic_pairs": "all"},
}


def run(pipeline: Pipeline, num_samples: int, *, at_once: bool = True):
    """Both stages over real models, all samples at once or one by one."""
    engines = load_engines(pipeline)
    samples = {sample.key: sample for sample in make_samples(num_samples)}
    groups = [list(samples.values())] if at_once else [[s] for s in reversed(samples.values())]
    rollouts, rewards = {}, {}
    for group in groups:
        drawn = list(pipeline.rollouts(engines, group))
        assert all(isinstance(outcome, SampleRollouts) for outcome in drawn)
        rollouts |= {outcome.key: outcome for outcome in drawn}
        rewards |= judged(pipeline, engines, [(samples[r.key], r) for r in drawn])
    return rollouts, rewards


@pytest.mark.parametrize("name", ["divide_and_conquer", "llava_critic"])
def test_babbling_judges_stop_nothing_and_are_counted(make_pipeline, name):
    pipeline = make_pipeline(name, pipeline_options=OPTIONS[name])
    rollouts, rewards = run(pipeline, 4)
    assert len(rewards) == 4
    for key, outcome in rewards.items():
        assert outcome.scores == []
        assert pipeline.candidate_pairs(rollouts[key], outcome) == []
        if name == "llava_critic":
            assert outcome.judge["comparisons"] == outcome.judge["verdict_unparsed"] > 0
            assert set(outcome.unscored) == {"no_verdict"}
            assert len(outcome.details["comparisons"]) == outcome.judge["comparisons"]
        else:
            assert outcome.judge["split_unparsed"] == len(rollouts[key].answers)
            assert set(outcome.unscored) == {"split_unparsed"}
            assert outcome.details["unread"]


def test_a_babbling_question_model_is_asked_again_and_counted(make_pipeline):
    pipeline = make_pipeline("divide_and_conquer", pipeline_options=OPTIONS["divide_and_conquer"])
    engines = load_engines(pipeline)
    put_words(engines["split"], lambda asked: "- one\n- two")
    [sample] = make_samples(1)
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, ["a", "b"]))]).values()
    assert rewards.unscored == {"question_count_mismatch": [0, 1]}
    assert rewards.judge["asked_again"] == rewards.judge["question_count_mismatch"] == 2
    assert len(engines["question_change"].counters) and not engines["auto_check"].counters


def test_a_judge_that_says_neither_yes_nor_no_shows_in_the_mass_outside(make_pipeline):
    pipeline = make_pipeline("divide_and_conquer", pipeline_options=OPTIONS["divide_and_conquer"])
    engines = load_engines(pipeline)
    put_words(engines["split"], lambda asked: "- one\n- two")
    put_words(engines["question_change"], lambda asked: "- one?\n- two?")
    [sample] = make_samples(1)
    [rewards] = judged(pipeline, engines, [(sample, rollouts_of(sample, ["a"]))]).values()
    facts = rewards.scores[0].details["facts"]
    outside = sum(1 - fact["p_yes"] - fact["p_no"] for fact in facts)
    assert rewards.judge["outside_mass"] == pytest.approx(outside, abs=1e-5)
    assert 0.5 < outside / 2 < 1


@pytest.mark.parametrize("name", ["divide_and_conquer", "llava_critic"])
def test_what_a_judge_says_does_not_depend_on_company_or_order(make_pipeline, name):
    pipeline = make_pipeline(name, pipeline_options=OPTIONS[name])
    assert run(pipeline, 3)[1] == run(pipeline, 3, at_once=False)[1]


def test_what_a_judge_says_depends_on_the_seed(make_pipeline):
    said = []
    for seed in (0, 1):
        pipeline = make_pipeline("llava_critic", pipeline_options=OPTIONS["llava_critic"])
        config = pipeline.config.to_dict() | {"seed": seed}
        pipeline = type(pipeline)(pipeline.config.create(config))
        engines = load_engines(pipeline)
        samples = make_samples(1)
        [drawn] = make_pipeline("llava_critic").rollouts(engines, samples)
        [rewards] = judged(pipeline, engines, [(samples[0], drawn)]).values()
        said.append([c["reply"] for c in rewards.details["comparisons"]])
    assert said[0] != said[1]
