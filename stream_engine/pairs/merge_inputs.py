"""What a merge is made from: the shards with complete results, their counts, and their hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from stream_engine import __version__
from stream_engine.config import (
    STAGES,
    OutputConfig,
    RankingConfig,
    RunConfig,
    Stage,
    fingerprint,
)
from stream_engine.errors import ConfigError, ConservationError, MissingStageError, ShardReadError
from stream_engine.records import SCHEMA_VERSION, ShardInfo
from stream_engine.run_dir.failures import read_failure
from stream_engine.run_dir.manifest import Manifest, Shard
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import Checksums
from stream_engine.run_dir.results import ResultHeader, read_identified, verify_result
from stream_engine.run_dir.rounds import Fingerprints, num_rejected_in
from stream_engine.run_dir.state import RunState, numbered

MAX_NAMED = 10  # shards named in a message


class ShardCounts(NamedTuple):
    """Of one shard whose stages are both complete."""

    samples: int
    failed_rollouts: int
    failed_rewards: int
    scored: int


class MergeInputs:
    """The shards of a run as a merge sees them; infos are read from the manifest when needed."""

    def __init__(
        self,
        manifest: Manifest,
        fingerprints: Mapping[Stage, str],
        *,
        number: int | None = None,
    ) -> None:
        """`number` is that of the round whose shards these are; None: those of all rounds."""
        self.manifest = manifest
        self.fingerprints = Fingerprints.given(fingerprints)
        self.number = number
        self.missing: list[int] = []
        self.num_missing_samples = 0
        self.digest: list[tuple[int, str, ShardCounts | None]] = []
        self.results: dict[int, Checksums] = {}
        """Of the shards that take part."""
        self.images: Counter[int] = Counter()
        self.modified: dict[int, float] = {}
        """When the newest result of a shard was written."""

    @property
    def num_shards(self) -> int:
        return len(self.digest)

    @property
    def newest(self) -> float:
        return max(self.modified.values(), default=0.0)

    def shards(self, start: int = 0) -> Iterator[ShardInfo]:
        """The shards that take part, in order, but for the first `start`."""
        there = [index for index, _, counts in self.digest if counts is not None]
        offsets = self.manifest.shards.offsets
        return self.manifest.shards.at([offsets[index] for index in there[start:]])

    def round_of(self, index: int) -> int:
        """The number of a shard's round."""
        return self.fingerprints.round_of(index)

    def of_known_round(self, number: int) -> MergeInputs:
        """The shards of one round.

        Raises:
            ConfigError: when the run has none of that number.
        """
        if not 1 <= number <= self.fingerprints.at_hand:
            raise ConfigError(f"no round {number}: the run has {self.fingerprints.at_hand}")
        return self.of_round(number)

    def of_round(self, number: int) -> MergeInputs:
        """The shards of one round."""
        part = MergeInputs(self.manifest, self.fingerprints, number=number)
        shards = self.fingerprints.shards_of(number, len(self.manifest.shards))
        for index, sha256, counts in self.digest:
            if index in shards:
                part.note(self.manifest.slim[index], sha256, counts)
        part.results = {i: found for i, found in self.results.items() if i in shards}
        part.modified = {i: when for i, when in self.modified.items() if i in shards}
        return part

    def note(self, shard: Shard | ShardInfo, sha256: str, counts: ShardCounts | None) -> None:
        """Take up a shard; `counts` is None where it lacks results."""
        self.digest.append((shard.index, sha256, counts))
        self.images.update(shard.images)
        if counts is None:
            self.missing.append(shard.index)
            self.num_missing_samples += shard.num_samples

    @property
    def samples(self) -> dict[str, Any]:
        """total = scored + quarantined + missing; `rejected` are the inputs' records."""
        counts = [counts for _, _, counts in self.digest if counts is not None]
        return {
            "total": sum(one.samples for one in counts) + self.num_missing_samples,
            "scored": sum(one.scored for one in counts),
            "quarantined": {
                "rollouts": sum(one.failed_rollouts for one in counts),
                "rewards": sum(one.failed_rewards for one in counts),
            },
            "missing": self.num_missing_samples,
            "with_images": {str(k): count for k, count in sorted(self.images.items())},
            "rejected": self.num_rejected,
        }

    @property
    def num_rejected(self) -> int:
        """Records of the inputs that came to no sample; of a round, those that it read first."""
        of_rounds = num_rejected_in(self.manifest.num_rejected.values(), self.fingerprints.firsts)
        return sum(of_rounds) if self.number is None else of_rounds[self.number - 1]

    def check_complete(self, *, allow_partial: bool) -> None:
        """Raise MissingStageError when there is no shard, or some lack results and that is not
        allowed."""
        if self.num_shards == 0:
            root = self.manifest.run_dir.root
            raise MissingStageError(f"{root} has no shards; `stream-engine shard` makes them")
        if self.missing and not allow_partial:
            raise MissingStageError(
                f"{len(self.missing)} of {self.num_shards} shards have no complete results "
                f"({named_shards(self.missing)}); `stream-engine work` computes them"
            )

    def fingerprint(self, config: RunConfig, format: str) -> str:
        """Hash of everything that shapes the dataset of one format."""
        return fingerprint(
            {
                **self.settings(config, format),
                "rounds": self.number or self.fingerprints.firsts,
                "stages": self.fingerprints.of_rounds
                if self.number is None
                else self.fingerprints.of_round(self.number),
                "shards": self.digest,
                "rejected": self.samples["rejected"],
            }
        )

    def settings(self, config: RunConfig, format: str) -> dict[str, Any]:
        """What of that holds for each row, whatever shards and rounds there are."""
        return {
            "version": [__version__, SCHEMA_VERSION],
            "pipeline": config.pipeline_name,
            "options": config.pipeline_options,
            "seed": config.seed,
            "ranking": msgspec.to_builtins(config.part(RankingConfig)),
            "format": format,
            "output": msgspec.to_builtins(
                replace(config.part(OutputConfig), format=(), report="auto")  # no part of it
            ),
        }


def read_inputs(run_dir: RunDir, fingerprints: Mapping[Stage, str]) -> MergeInputs:
    """Look at the manifest and at every result's header; shards whose tar is damaged are missing.

    Raises:
        ConservationError: when a result's counts are not those of what it was made from.
        ShardReadError: when that is because a result file is damaged.
    """
    inputs = MergeInputs(Manifest.load(run_dir), fingerprints)
    without_tar = set(damaged_tars(run_dir, fingerprints))
    written = {stage: dict(numbered(run_dir.results_dir(stage))) for stage in STAGES}
    for info in inputs.manifest.slim:
        counts = None
        if info.index not in without_tar and all(info.index in written[s] for s in STAGES):
            of_round = inputs.fingerprints.of(info.index)
            counts = complete_counts(run_dir, info, of_round, inputs.results)
        inputs.note(info, info.sha256, counts)
        if counts is not None:
            newest = max(written[stage][info.index].modified for stage in STAGES)
            inputs.modified[info.index] = newest
    return inputs


def named_shards(indices: list[int]) -> str:
    """`shards 3, 5, 8 and 12 more`."""
    named = ", ".join(str(index) for index in indices[:MAX_NAMED])
    more = f" and {len(indices) - MAX_NAMED} more" if len(indices) > MAX_NAMED else ""
    return f"shard{'s' if len(indices) > 1 else ''} {named}{more}"


def damaged_tars(run_dir: RunDir, fingerprints: Mapping[Stage, str]) -> Iterator[int]:
    """The shards whose tar a merge found damaged under these settings, until they are put back."""
    every_round = Fingerprints.given(fingerprints)
    for index, _ in numbered(run_dir.failures_dir):
        failure = read_failure(run_dir, index)
        if failure is None or failure.damaged != "tar":
            continue
        if failure.fingerprint == every_round.of(index)[failure.stage]:
            yield index


def seen_inputs(state: RunState) -> MergeInputs:
    """The same from the headers that a RunState has read already; no file is opened.

    The results' times are left out: the dataset that is held against these is known to be new.
    """
    inputs = MergeInputs(state.manifest, state.fingerprints)
    for shard in state.shards:
        counts = None
        is_whole = all(state.is_complete(stage, shard) for stage in STAGES)
        if is_whole and not state.is_failed(shard):
            rollouts, rewards = (state.header(stage, shard) for stage in STAGES)
            assert rollouts is not None and rewards is not None
            counts = counts_of(shard.num_samples, rollouts, rewards)
        inputs.note(shard, shard.sha256, counts)
    return inputs


def complete_counts(
    run_dir: RunDir,
    info: Shard,
    fingerprints: Mapping[Stage, str],
    results: dict[int, Checksums],
) -> ShardCounts | None:
    """The counts of a shard whose stages are both complete, else None; notes their checksums.

    After `retry-failed` a result covers a part of its samples, and is not complete.
    """
    try:
        found = [read_identified(run_dir.result(stage, info.index)) for stage in STAGES]
    except ShardReadError:
        return None
    (rollouts, of_rollouts), (rewards, of_rewards) = found
    for header, stage in zip((rollouts, rewards), STAGES):
        if (header.shard_sha256, header.fingerprint) != (info.sha256, fingerprints[stage]):
            return None
    check_header(run_dir, info, rollouts, info.num_samples)
    check_header(run_dir, info, rewards, rollouts.num_results)
    if rollouts.num_samples < info.num_samples or rewards.num_samples < rollouts.num_results:
        return None
    results[info.index] = of_rollouts, of_rewards
    return counts_of(info.num_samples, rollouts, rewards)


def counts_of(num_samples: int, rollouts: ResultHeader, rewards: ResultHeader) -> ShardCounts:
    return ShardCounts(
        samples=num_samples,
        failed_rollouts=rollouts.num_quarantined,
        failed_rewards=rewards.num_quarantined,
        scored=rewards.num_results,
    )


def check_header(run_dir: RunDir, info: Shard, header: ResultHeader, num_inputs: int) -> None:
    """Samples in = results + quarantined, and no more samples than there are."""
    outcomes = header.num_results + header.num_quarantined
    if header.num_samples != outcomes or header.num_samples > num_inputs:
        for stage in STAGES:  # a changed byte is one shard's damage, not a fault in the counting
            verify_result(run_dir.result(stage, info.index))
        raise ConservationError(
            f"shard {info.index}, {header.stage}: {num_inputs} samples went in, but the result "
            f"speaks of {header.num_samples}: {header.num_results} results and "
            f"{header.num_quarantined} quarantined"
        )
