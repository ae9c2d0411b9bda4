"""Per question and model: one image encoded, one prompt prefilled, counted by forward hooks."""

from __future__ import annotations

from collections import Counter

import pytest

from stream_engine.engine import Engine
from stream_engine.records import SampleRollouts
from tests.pipelines.conftest import (
    judged,
    load_engines,
    make_samples,
    put_words,
    rollouts_of,
)

NUM_SAMPLES = 3
TEXTS = ["a red cat", "a blue cat", "a dog. a red cat", "a red cat"]


def count_forwards(engine: Engine) -> Counter[str]:
    """Images through the tower, and tokens through the language model, from now on."""
    seen: Counter[str] = Counter()

    def tower(module, args, kwargs, output):
        seen["images"] += len(kwargs["pixel_values"])

    def language_model(module, args, kwargs, output):
        seen["tokens"] += kwargs["inputs_embeds"].shape[1]

    engine.model.tower.register_forward_hook(tower, with_kwargs=True)
    engine.model.backbone.register_forward_hook(language_model, with_kwargs=True)
    return seen


def check_counts(engine: Engine, seen: Counter[str], *, images: int, prompts: int) -> None:
    """One prefill a prompt: no token is run that is not a prompt's, a suffix's or a drawn one's."""
    counters = engine.counters
    assert seen["images"] == images
    assert counters["prompts"] == prompts
    parts = ("prompt_tokens", "suffix_tokens", "decode_tokens")
    assert seen["tokens"] == sum(counters[part] for part in parts)


@pytest.mark.parametrize("name", ["dpo_reward", "divide_and_conquer", "llava_critic"])
def test_rollouts_encode_and_prefill_once_a_question(make_pipeline, name):
    pipeline = make_pipeline(name)
    engines = load_engines(pipeline)
    seen = count_forwards(engines["instruct"])
    samples = make_samples(NUM_SAMPLES)
    rollouts = list(pipeline.rollouts(engines, samples))
    assert {len(r.answers) for r in rollouts} == {4}
    check_counts(engines["instruct"], seen, images=NUM_SAMPLES, prompts=NUM_SAMPLES)


def test_dpo_reward_encodes_and_prefills_once_a_question(make_pipeline):
    pipeline = make_pipeline("dpo_reward")
    engines = load_engines(pipeline)
    samples = {sample.key: sample for sample in make_samples(NUM_SAMPLES)}
    rollouts = [
        outcome
        for outcome in pipeline.rollouts(engines, list(samples.values()))
        if isinstance(outcome, SampleRollouts)
    ]
    seen = count_forwards(engines["reward"])
    judged(pipeline, engines, [(samples[r.key], r) for r in rollouts])
    check_counts(engines["reward"], seen, images=NUM_SAMPLES, prompts=NUM_SAMPLES)


def test_llava_critic_encodes_and_prefills_once_a_question(make_pipeline):
    pipeline = make_pipeline("llava_critic", pipeline_options={"critic_max_new_tokens": 6})
    engines = load_engines(pipeline)
    seen = count_forwards(engines["critic"])
    cases = [(sample, rollouts_of(sample, TEXTS)) for sample in make_samples(NUM_SAMPLES)]
    rewards = judged(pipeline, engines, cases)
    assert {r.judge["comparisons"] for r in rewards.values()} == {6}
    check_counts(engines["critic"], seen, images=NUM_SAMPLES, prompts=NUM_SAMPLES)


def test_divide_and_conquer_encodes_and_prefills_once_a_question(make_pipeline):
    """The text models too: once a question for all its answers."""
    options = {"text_max_new_tokens": 6}
    pipeline = make_pipeline("divide_and_conquer", pipeline_options=options)
    engines = load_engines(pipeline)
    cases = [(sample, rollouts_of(sample, TEXTS)) for sample in make_samples(NUM_SAMPLES)]
    seen = count_forwards(engines["split"])
    judged(pipeline, engines, cases)
    check_counts(engines["split"], seen, images=0, prompts=NUM_SAMPLES)

    engines = load_engines(pipeline)
    put_words(engines["split"], lambda asked: "- one\n- two")
    put_words(engines["question_change"], lambda asked: "- one?\n- two?")
    seen = count_forwards(engines["auto_check"])
    rewards = judged(pipeline, engines, cases)
    assert {r.judge["facts_checked"] for r in rewards.values()} == {2}
    check_counts(engines["auto_check"], seen, images=NUM_SAMPLES, prompts=NUM_SAMPLES)
    assert engines["auto_check"].counters["decode_tokens"] == 0
