"""Rounds: which settings answered which shards.

A run has one round until `stream-engine round` begins the next one, whose questions another model
answers. Shards are numbered as they are cut and are never cut again, so a round is a range of
shards: where it begins is all that must be kept of it beside its settings.

    run.json     `rounds` has those that are over: settings, fingerprints, engines, first shard;
                 everything else in the file is of the round at hand
    results      carry the fingerprint of their round; for a shard no other counts
    reading      cuts new shards at the end, so what is appended, or was mended, is of the round at
                 hand; `--questions` bounds what that takes of the inputs
    work         a worker is at one round: first at what was put back of earlier ones, each with its
                 own models, which must be what they were; then at the one at hand
    ranking      pipeline, its options and seed are those of all rounds; lengths are balanced within
                 a round, so that later ones leave its pairs as they are
    dataset/     the pairs of all rounds, with a column `round`
    rounds/2/    the pairs of round 2 alone, for a trainer, in the same folders as the run's
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgspec

from stream_engine.config import (
    OutputConfig,
    RankingConfig,
    RunConfig,
    Stage,
    WorkerConfig,
    names_of,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files

OF_THIS_CALL = (
    *(*names_of(RankingConfig), *names_of(OutputConfig), *names_of(WorkerConfig)),
    *("work_dir", "device", "max_batch_tokens", "max_rows", "placement", "tensor_parallel"),
    *("offload", "offload_path", "reward_model_python_path", "run_stage", "track"),
)
"""Settings that shape no answer and no score: those of the round at hand hold for all."""


class StageInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What shaped a stage's results, flat, and its hash."""

    fingerprint: str
    inputs: dict[str, Any]


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """A round that is over, as run.json keeps it."""

    first_shard: int
    settings: dict[str, Any]
    stages: dict[Stage, StageInputs]
    engines: dict[str, dict[str, Any]] = {}

    @property
    def fingerprints(self) -> dict[Stage, str]:
        return fingerprints_of(self.stages)


class Fingerprints(dict[Stage, str]):
    """Of each stage in the round at hand; `of` tells those that count for a shard."""

    def __init__(
        self,
        at_hand: Mapping[Stage, str],
        earlier: Sequence[tuple[int, Mapping[Stage, str]]] = (),
        first_shard: int = 0,
    ) -> None:
        """`earlier` has the first shard and the fingerprints of each round that is over."""
        super().__init__(at_hand)
        self.firsts = [*(first for first, _ in earlier), first_shard]
        self.of_rounds = [*(dict(fingerprints) for _, fingerprints in earlier), dict(at_hand)]

    @classmethod
    def given(cls, fingerprints: Mapping[Stage, str]) -> Fingerprints:
        """These, or those of a run that has one round."""
        return fingerprints if isinstance(fingerprints, Fingerprints) else cls(fingerprints)

    def round_of(self, index: int) -> int:
        """The number of the round, from 1, that a shard belongs to."""
        return max(1, bisect_right(self.firsts, index))

    def of(self, index: int) -> Mapping[Stage, str]:
        """Those that count for a shard."""
        return self.of_rounds[self.round_of(index) - 1]

    def of_round(self, number: int) -> Mapping[Stage, str]:
        return self.of_rounds[number - 1]

    def shards_of(self, number: int, num_shards: int) -> range:
        """The shards of a round, of so many that there are."""
        ends = [*self.firsts[1:], num_shards]
        return range(self.firsts[number - 1], ends[number - 1])

    def first_of_next(self, firsts: Sequence[int]) -> int | None:
        """The first shard of the round after the one at hand, if these first shards, one of each
        round, have one."""
        return firsts[self.at_hand] if len(firsts) > self.at_hand else None

    @property
    def at_hand(self) -> int:
        """The number of the round at hand, which is how many there are."""
        return len(self.firsts)

    @property
    def first_shard(self) -> int:
        """The first shard of the round at hand."""
        return self.firsts[-1]


def fingerprints_of(stages: Mapping[Stage, StageInputs]) -> dict[Stage, str]:
    """The fingerprint of each stage."""
    return {stage: inputs.fingerprint for stage, inputs in stages.items()}


def answering_model(settings: Mapping[str, Any]) -> str:
    """Who answers under these settings: a path, a server's address, or "" where neither is told."""
    return settings.get("sampler") or settings["instruct_model_path"] or ""


def config_of_round(rounds: Sequence[Round], number: int, config: RunConfig) -> RunConfig:
    """The settings by which a round's shards are done, and its pairs told of.

    Args:
        rounds: those that are over.
        config: the settings of this call, which are those of the round at hand.
    """
    if number > len(rounds):
        return config
    theirs = rounds[number - 1].settings
    return RunConfig.create(theirs | {name: getattr(config, name) for name in OF_THIS_CALL})


def num_rejected_in(readings: Iterable[Mapping[int, int]], firsts: Sequence[int]) -> list[int]:
    """How many records came to no sample, by the round whose reading met them first.

    A later round reads an input from its start again: what it rejects beyond those of before is its
    own. One that was mended since counts no more.

    Args:
        readings: of each input, how many were rejected, by the first shard of the reading's round.
        firsts: the first shard of each round.
    """
    up_to = [0] * len(firsts)
    for of_source in readings:
        counts = [0]
        for first in firsts:
            counts.append(of_source.get(first, counts[-1]))
        least = list(accumulate(reversed(counts[1:]), min))[::-1]
        up_to = [total + count for total, count in zip(up_to, least)]
    return [count - before for before, count in zip((0, *up_to), up_to)]


def resolved_sampling(run_dir: RunDir, number: int | None = None) -> dict[str, Any] | None:
    """The sampling values that the instruct model's engine noted in a round, without a number the
    one at hand; None where there are none."""
    run_file = run_file_as_read(run_dir)
    if number is not None and number <= len(run_file.get("rounds", [])):
        run_file = run_file["rounds"][number - 1]
    return run_file.get("engines", {}).get("instruct", {}).get("sampling")


def firsts_on_file(run_dir: RunDir) -> list[int]:
    """The first shard of each round that run.json tells of now; empty where it cannot be read."""
    run_file = run_file_as_read(run_dir)
    earlier = [one["first_shard"] for one in run_file.get("rounds", [])]
    return [*earlier, run_file.get("first_shard", 0)] if run_file else []


def run_file_as_read(run_dir: RunDir) -> dict[str, Any]:
    """run.json as plain values, for a look at one of them; empty where it cannot be read."""
    try:
        return msgspec.json.decode(files.read_bytes(run_dir.run_json) or b"", type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
