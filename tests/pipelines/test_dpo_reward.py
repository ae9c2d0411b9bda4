"""dpo_reward with a tiny real model as instruct and reward model alike."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from stream_engine.config import RunConfig
from stream_engine.demo import checkpoint_path, demo_models
from stream_engine.errors import ConfigError
from stream_engine.pipelines.dpo_reward import DPORewardPipeline
from stream_engine.pipelines.llava_critic import LlavaCriticPipeline
from stream_engine.records import Answer, Failure, SampleRewards
from stream_engine.work.stage_inputs import stage_inputs
from tests.pipelines.conftest import load_engines, make_samples


def test_nan_of_the_reward_model_sets_its_sample_aside_alone(make_pipeline):
    """A reward that was NaN (float16 overflow) became a sort key and the margin of pairs, and the
    histogram of margins raised at it, so that the whole dataset could not be merged."""
    pipeline = make_pipeline("dpo_reward")
    engines = load_engines(pipeline)
    samples = make_samples(3)
    rollouts = {record.key: record for record in pipeline.rollouts(engines, samples)}
    cases = [(sample, rollouts[sample.key]) for sample in samples]
    bad = samples[1].key
    expected = {outcome.key: outcome for outcome in pipeline.rewards(engines, cases)}
    assert all(isinstance(outcome, SampleRewards) for outcome in expected.values())

    reward = engines["reward"]
    prepare = reward.prepare

    def overflowing(questions):
        for key, prompt in prepare(questions):
            if key == bad:
                prompt.vision[0][:] = math.nan
            yield key, prompt

    reward.prepare = overflowing
    outcomes = {outcome.key: outcome for outcome in pipeline.rewards(engines, cases)}
    failure = outcomes.pop(bad)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.stage) == ("nonfinite_logits", "rewards")
    assert "--dtype float32" in failure.detail
    assert outcomes == {key: rewards for key, rewards in expected.items() if key != bad}


def test_a_base_model_of_its_own_stands_in_the_instruct_models_place():
    """In later rounds the answers are of a model that the reward model was not trained from."""
    paths = {name: str(checkpoint_path(name)) for name in ("instruct", "reward", "judge")}
    settings = {"sample_k": 2, "rank": 1, "max_new_tokens": 8, "device": "cpu"}
    plain = DPORewardPipeline(
        RunConfig(
            instruct_model_path=paths["instruct"], reward_model_path=paths["reward"], **settings
        )
    )
    later = DPORewardPipeline(
        RunConfig(
            instruct_model_path=paths["judge"],
            reward_model_path=paths["reward"],
            base_model_path=paths["instruct"],
            **settings,
        )
    )
    assert [role.name for role in later.roles()] == ["instruct", "base", "reward"]
    samples = make_samples(2)
    engines, others = load_engines(plain), load_engines(later)
    answers = {record.key: record for record in plain.rollouts(engines, samples)}
    wanted = {
        one.key: one for one in plain.rewards(engines, [(s, answers[s.key]) for s in samples])
    }
    foreign = {
        key: replace(record, answers=[without_logps(answer) for answer in record.answers])
        for key, record in answers.items()
    }
    found = {one.key: one for one in later.rewards(others, [(s, foreign[s.key]) for s in samples])}
    for key, rewards in wanted.items():
        for one, other in zip(rewards.scores, found[key].scores, strict=True):
            assert other.scores == pytest.approx(one.scores, abs=1e-5)
            assert other.token_logps == pytest.approx(one.token_logps, abs=1e-5)
    base = [score.details["base_token_logps"] for score in found[samples[0].key].scores]
    scored = [answer.scored_logps for answer in answers[samples[0].key].answers]
    assert all(ours == pytest.approx(theirs, abs=1e-4) for ours, theirs in zip(base, scored))


def without_logps(answer: Answer) -> Answer:
    """An answer as a model would have told it that knows nothing of the reward's base."""
    nothing = [0.0] * len(answer.token_logps)
    return replace(answer, token_logps=nothing, end_logp=None if answer.end_logp is None else 0.0)


def test_the_instruct_model_named_as_base_is_not_loaded_twice():
    instruct, reward = str(checkpoint_path("instruct")), str(checkpoint_path("reward"))
    config = RunConfig(
        instruct_model_path=instruct, reward_model_path=reward, base_model_path=f"{instruct}/"
    )
    assert [role.name for role in DPORewardPipeline(config).roles()] == ["instruct", "reward"]
    with pytest.raises(ConfigError, match="is the base model itself"):
        DPORewardPipeline(config).check_models({"instruct": "a", "base": "b", "reward": "b"})


def test_a_base_model_is_refused_where_nothing_is_scored_against_one():
    models = demo_models("llava_critic") | {"base_model_path": str(checkpoint_path("instruct"))}
    pipeline = LlavaCriticPipeline(RunConfig(pipeline_name="llava_critic", **models))
    with pytest.raises(ConfigError, match="llava_critic scores without a base model"):
        stage_inputs(pipeline)
