"""What a pipeline is: how samples get answers, how answers get scores, how scores become pairs.

A pipeline knows no cache, no file and no shard: it is handed engines and records, and yields
records. Where a role's model is on a server it is handed a ServerModel, which is asked in words.
Its module imports torch nowhere at the top, so that merging and `--help` stay light.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from stream_engine.config import ModelRole, RunConfig, Stage
from stream_engine.errors import ConfigError
from stream_engine.pipelines.given import score_given_answers
from stream_engine.pipelines.ranking import is_given_pair, rank_as_given
from stream_engine.pipelines.rollouts import sample_answers
from stream_engine.pipelines.server_answers import answers_of_server
from stream_engine.records import (
    Failure,
    PreferencePair,
    Sample,
    SampleRewards,
    SampleRollouts,
)

if TYPE_CHECKING:
    from stream_engine.engine import Engine

SAMPLER = "sampler"
"""The role of a model on a server that draws the answers."""


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For pipelines without settings of their own."""


class Pipeline(ABC):
    """One way to build preference pairs. Instances hold settings only."""

    name: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    length_balance: ClassVar[Literal["mean", "ratio"] | None] = "mean"
    """How the merger keeps chosen answers from being simply the longer ones; see balance.py."""
    needs_logps: ClassVar[bool] = True
    """Whether scores need the instruct model's log-probs: then it is here, whoever draws."""
    has_base: ClassVar[bool] = False
    """Whether a reward is told against a base model: --base_model_path, else the instruct model."""
    judge_rates: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Rates for stats.json: name -> (numerator, denominator) among `SampleRewards.judge`."""

    def __init__(self, config: RunConfig) -> None:
        """Raises ConfigError when a path is missing or an option is unknown."""
        self.config = config
        try:
            self.options: Any = msgspec.convert(config.pipeline_options, self.Options, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.name}: bad option: {error}") from error

    def required_path(self, setting: str) -> str:
        """The value of a path setting. Raises ConfigError when it was not given."""
        path = getattr(self.config, setting)
        if not path:
            raise ConfigError(f"{self.name} needs --{setting}")
        return path

    def instruct_role(self) -> ModelRole:
        """The model that draws the answers, or only scores them where a server's model draws."""
        path, hint = self.required_path("instruct_model_path"), self.config.instruct_model_name
        return ModelRole("instruct", path, "rollouts", hint, draws=self.config.sampler is None)

    def answer_roles(self) -> tuple[ModelRole, ...]:
        """The models of stage 0, the same in every pipeline."""
        if self.config.sampler is None:
            return (self.instruct_role(),)
        sampler = ModelRole(SAMPLER, self.config.sampler, "rollouts")
        if self.needs_logps or self.config.instruct_model_path:
            return sampler, self.instruct_role()
        return (sampler,)

    def planned_calls(self, num_samples: int) -> dict[str, int]:
        """Replies that a judge will be asked for, by role, where their number is a choice."""
        return {}

    @abstractmethod
    def roles(self) -> tuple[ModelRole, ...]:
        """The models by role, each with its stage. Paths are checked here."""

    def check_models(self, fingerprints: Mapping[str, str]) -> None:
        """Raise ConfigError when checkpoints (fingerprints by role) make no sense together."""
        return None

    @abstractmethod
    def settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that shape a stage's results, besides its models and the stage before."""

    def rollouts(
        self,
        engines: Mapping[str, Engine],
        samples: Sequence[Sample],
        ahead: Iterable[Sample] = (),
    ) -> Iterator[SampleRollouts | Failure]:
        """Stage 0: answers for every sample, or the failure that sets it aside; in any order.

        Answers that a sample brings are scored, and the others sampled: by the instruct model, or
        by the one on a server that is to, whose texts are then scored like those of the input.

        `ahead` are samples of the next call, to be read only when there is room to begin them; a
        pipeline that draws its answers in a way of its own may ignore them.
        """
        if self.config.sampler is not None:
            sampler: Any = engines[SAMPLER]
            yield from answers_of_server(
                sampler,
                engines.get("instruct"),
                samples,
                sample_k=self.config.sample_k,
                seed=self.config.seed,
            )
            return
        engine = engines["instruct"]
        yield from score_given_answers(engine, [sample for sample in samples if sample.answers])
        yield from sample_answers(
            engine,
            [sample for sample in samples if not sample.answers],
            (sample for sample in ahead if not sample.answers),
            sample_k=self.config.sample_k,
            seed=self.config.seed,
        )

    @abstractmethod
    def rewards(
        self,
        engines: Mapping[str, Engine],
        samples: Sequence[tuple[Sample, SampleRollouts]],
    ) -> Iterator[SampleRewards | Failure]:
        """Stage 1: scores for every sample's answers, or the failure that sets it aside."""

    @abstractmethod
    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        """Stage 2: candidate pairs of one sample, best first. Filters and balance come after."""

    def pairs_of(self, sample: SampleRollouts, rewards: SampleRewards) -> list[PreferencePair]:
        """The candidate pairs of one sample: those that the input had made, else the pipeline's."""
        if is_given_pair(sample.answers):
            relabel = self.config.disagreements == "relabel"
            return rank_as_given(sample.answers, rewards, relabel=relabel)
        return self.candidate_pairs(sample, rewards)
