"""dpo_reward with a tiny real model as instruct and reward model alike."""

from __future__ import annotations

import math

from stream_engine.records import Failure, SampleRewards
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
