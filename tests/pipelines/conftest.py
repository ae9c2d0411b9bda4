"""A tiny random LLaVA that plays every role, and a way to put words into its mouth."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_engine.config import ModelConfig, RunConfig, SamplingConfig
from stream_engine.engine import (
    Engine,
    GeneratedRow,
    GenerateRequest,
    Generation,
    NextTokenLogps,
    ScoreRequest,
    load_engine,
)
from stream_engine.models.base import Prompt
from stream_engine.pipelines import pipeline_class
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.yes_no import yes_no_tokens
from stream_engine.records import (
    Answer,
    EncodedImage,
    PromptDigest,
    Sample,
    SampleRewards,
    SampleRollouts,
    sample_key,
)
from tests.engine.conftest import picture
from tests.models import writers_llava as writers

SAMPLE_K = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Room for the judges' prompts, which the tiny tokenizer cuts into hundreds of tokens."""
    folder = tmp_path_factory.mktemp("judge") / "llava"
    weights = writers.random_weights(writers.Shape(), seed=5)
    return writers.write_original(folder, weights, max_position_embeddings=2048)


@pytest.fixture
def make_pipeline(checkpoint: Path) -> Callable[..., Pipeline]:
    """A pipeline whose every model is the tiny checkpoint; keywords are settings or options."""

    def make(name: str, **settings: Any) -> Pipeline:
        reward = ",".join([str(checkpoint)] * (3 if name == "divide_and_conquer" else 1))
        defaults = {
            "pipeline_name": name,
            "instruct_model_path": str(checkpoint),
            "reward_model_path": reward,
            "sample_k": SAMPLE_K,
            "rank": 1,
            "temperature": 1.0,
            "top_k": 0,
            "max_new_tokens": 10,
            "device": "cpu",
        }
        config = RunConfig.create(defaults | settings)
        return pipeline_class(name)(config)

    return make


def load_engines(pipeline: Pipeline) -> dict[str, Engine]:
    """One engine a role, through the real loader."""
    models, sampling = pipeline.config.part(ModelConfig), pipeline.config.part(SamplingConfig)
    return {role.name: load_engine(role, models, sampling) for role in pipeline.roles()}


def make_samples(count: int) -> list[Sample]:
    samples = []
    for number in range(count):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        images = (EncodedImage(buffer.getvalue()),)
        question = "What is it?" if number % 2 else "Describe the image."
        key = sample_key(str(number), question, images)
        samples.append(Sample(key=key, idx=str(number), question=question, images=images))
    return samples


def rollouts_of(sample: Sample, texts: Sequence[str]) -> SampleRollouts:
    """Rollouts with these answers; only their texts and indices matter to judges."""
    answers = [
        Answer(index=i, text=text, token_ids=[5], token_logps=[-1.0], finish_reason="stop")
        for i, text in enumerate(texts)
    ]
    return SampleRollouts(key=sample.key, prompt=PromptDigest("", "", ""), answers=answers)


def text_of(engine: Engine, prompt: Prompt, suffix: Sequence[int]) -> str:
    """What a model is asked, from the very ids it is handed."""
    ids = [token for token in (*prompt.ids, *suffix) if token >= 0]
    return engine.model.tokenizer.decode(ids, skip_special_tokens=True)


def put_words(engine: Engine, reply: Callable[[str], str | None]) -> list[str]:
    """Let the engine say `reply(what it is asked)` instead of sampling; None babbles to the limit.

    Returns the list to which everything asked is added.
    """
    asked: list[str] = []

    def generate(requests: Iterable[GenerateRequest]) -> Iterator[Generation]:
        for request in requests:
            rows = []
            for row in request.rows:
                asked.append(text_of(engine, request.prompt, row.suffix_ids))
                said = reply(asked[-1])
                ids = engine.model.encode_text("- a cut one" if said is None else said)
                rows.append(GeneratedRow(ids, [], "length" if said is None else "stop"))
            yield Generation(request.key, rows)

    engine.generate = generate  # type: ignore[method-assign,assignment]
    return asked


def put_opinions(engine: Engine, p_yes: Callable[[str], float], *, mass: float = 1.0) -> list[str]:
    """Let the engine affirm with probability `p_yes(what it is asked)` * `mass`, else deny."""
    asked: list[str] = []
    tokens = yes_no_tokens(engine.model)

    def next_token_logps(
        requests: Iterable[ScoreRequest], watched: Sequence[int]
    ) -> Iterator[NextTokenLogps]:
        for request in requests:
            rows = []
            for suffix in request.continuations:
                asked.append(text_of(engine, request.prompt, suffix))
                yes = p_yes(asked[-1])
                share = {tokens.yes[0]: yes * mass, tokens.no[0]: (1 - yes) * mass}
                rows.append([math.log(share.get(token, 0.0) + 1e-30) for token in watched])
            yield NextTokenLogps(request.key, rows)

    engine.next_token_logps = next_token_logps  # type: ignore[method-assign,assignment]
    return asked


def judged(
    pipeline: Pipeline, engines: dict[str, Engine], cases: Sequence[tuple[Sample, SampleRollouts]]
) -> dict[str, SampleRewards]:
    """The rewards by key; every sample must have exactly one, and account for every answer."""
    outcomes = list(pipeline.rewards(engines, cases))
    assert sorted(o.key for o in outcomes) == sorted(sample.key for sample, _ in cases)
    by_key = {o.key: o for o in outcomes if isinstance(o, SampleRewards)}
    for _, rollouts in cases:
        if rewards := by_key.get(rollouts.key):
            scored = [score.index for score in rewards.scores]
            unscored = [i for indices in rewards.unscored.values() for i in indices]
            assert sorted(scored + unscored) == [answer.index for answer in rollouts.answers]
    return by_key
