"""A pipeline without models, for tests of what goes wrong: the question says what shall happen.

"boom ..."    raises, always                       "flaky ..."  raises on its first call
"aside ..."   is set aside at the rollouts         "unscored ..." is set aside at the rewards
"settings ..." raises ConfigError                "broken ..." fails in the model's forward
"lost ..."    loses the device on its first call "kill ..."   ends the process, always
"gone ..."    loses the device, always           anything else is answered
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from stream_engine.config import ModelRole, RunConfig, Stage
from stream_engine.errors import ConfigError
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.ranking import rank_by_reward
from stream_engine.records import (
    FORWARD_ERROR,
    Answer,
    AnswerScore,
    Failure,
    PreferencePair,
    PromptDigest,
    Sample,
    SampleRewards,
    SampleRollouts,
)

CALLS: Counter[str] = Counter()
"""How often each question reached a stage: `rollouts <question>`."""
SET_ASIDE = ("aside", "unscored")
AHEAD: list[list[str]] = []
"""Questions that the rollouts were offered ahead, where EchoPipeline reads them."""


class EchoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    echo_tone: str = "plain"
    """How the echo sounds."""
    echo_twice: bool = False
    looks_ahead: bool = False


class EchoPipeline(Pipeline):
    """Answers with the question's own words."""

    name: ClassVar[str] = "echo"
    Options: ClassVar[type[msgspec.Struct]] = EchoOptions

    def roles(self) -> tuple[ModelRole, ...]:
        return ()

    def settings(self, stage: Stage) -> dict[str, Any]:
        return {"echo_tone": self.options.echo_tone} if stage == "rewards" else {}

    def rollouts(
        self, engines: Mapping[str, Any], samples: Sequence[Sample], ahead: Iterable[Sample] = ()
    ) -> Iterator[SampleRollouts | Failure]:
        if self.options.looks_ahead:
            AHEAD.append([sample.question for sample in ahead])
        for sample in reversed(samples):
            CALLS[f"rollouts {sample.question}"] += 1
            misbehave(sample.question, CALLS[f"rollouts {sample.question}"])
            if sample.question.startswith("broken"):
                yield Failure(reason=FORWARD_ERROR, detail="no such token", key=sample.key)
                continue
            if sample.question.startswith("aside") and "aside" in SET_ASIDE:
                yield Failure(reason="too_odd", key=sample.key)
                continue
            yield SampleRollouts(
                key=sample.key,
                prompt=PromptDigest("ids", "pixels", "tokenizer"),
                answers=[answer(sample, j) for j in range(self.config.sample_k)],
            )

    def rewards(
        self, engines: Mapping[str, Any], samples: Sequence[tuple[Sample, SampleRollouts]]
    ) -> Iterator[SampleRewards | Failure]:
        for sample, rollouts in samples:
            CALLS[f"rewards {sample.question}"] += 1
            if sample.question.startswith("unscored") and "unscored" in SET_ASIDE:
                yield Failure(reason="no_verdict", key=sample.key)
                continue
            yield SampleRewards(key=sample.key, scores=[score(a) for a in rollouts.answers])

    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        ranking = {"rank": self.config.rank, "distance": self.config.distance}
        return rank_by_reward(sample.answers, rewards, **ranking)


def misbehave(question: str, num_calls: int) -> None:
    if question.startswith("boom") or (question.startswith("flaky") and num_calls == 1):
        raise RuntimeError(f"cannot stand {question!r}")
    if question.startswith("gone") or (question.startswith("lost") and num_calls == 1):
        raise RuntimeError("CUDA error: device-side assert triggered")
    if question.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if question.startswith("settings"):
        raise ConfigError("these models do not go together")


def answer(sample: Sample, index: int) -> Answer:
    words = [f"{sample.question.split()[0]}{index}", *sample.question.split(), "indeed"]
    return Answer(
        index=index,
        text=" ".join(words),
        token_ids=list(range(len(words))),
        token_logps=[-0.5] * len(words),
        finish_reason="stop",
        end_token_id=2,
        end_logp=-0.1,
    )


def score(one: Answer) -> AnswerScore:
    value = float(-one.index)
    scores = {"sum": value, "avg": value, "min": value, "orm": value}
    return AnswerScore(index=one.index, score=value, scores=scores)


def echo_config(work_dir: object, dataset: object, **settings: Any) -> RunConfig:
    """Settings of a small, quick echo run."""
    return RunConfig.create(
        {
            "pipeline_name": "echo",
            "work_dir": str(work_dir),
            "dataset_path": str(dataset),
            "sample_k": 4,
            "rank": 2,
            "samples_per_shard": 4,
            "retry_backoff_s": 0.0,
            **settings,
        }
    )
