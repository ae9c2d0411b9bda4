"""Entries for chosen places of a run: shards are read in order, and only those that are asked for.

Of a result file every record is passed over, and only the wanted ones are decoded whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec

from stream_engine.records import (
    Failure,
    PreferencePair,
    Sample,
    SampleRewards,
    SampleRollouts,
    ShardInfo,
)
from stream_engine.report.entries import Entry, Pieces, entry_of, set_aside_entry
from stream_engine.report.places import Shown
from stream_engine.report.run import ReportedRun
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.shards import read_shard

FLIP = "position flip"
"""The mark of a pair of which a critic named one place in both orders."""


class Keyed(msgspec.Struct):
    """The little that finds a record."""

    key: str


class Found(NamedTuple):
    """An entry and the sample with its pictures."""

    entry: Entry
    sample: Sample


def entries(
    run: ReportedRun, shown: Sequence[Shown], pieces: Pieces | None = None
) -> Iterator[Found]:
    """The entries of what is shown, in its order, which is the run's."""
    infos = run.inputs.manifest.shards
    for shard, group in groupby(shown, key=lambda one: one.place.shard):
        of_shard = list(group)
        for found in shard_entries(run.run_dir, infos[shard], of_shard, pieces):
            found.entry.round = run.round_of(shard)
            yield found


def shard_entries(
    run_dir: RunDir, info: ShardInfo, shown: Sequence[Shown], pieces: Pieces | None
) -> Iterator[Found]:
    """The entries of one shard."""
    numbers = {one.place.number for one in shown}
    rewards = rewards_at(run_dir, info, numbers)
    keys = {record.key for record in rewards.values()}
    rollouts = rollouts_of(run_dir, info, keys)
    samples = samples_of(run_dir, info, keys)
    for one in shown:
        scored = rewards[one.place.number]
        pair = one.pair and PreferencePair(
            key=scored.key,
            chosen=one.pair.chosen,
            rejected=one.pair.rejected,
            chosen_score=one.pair.chosen_score,
            rejected_score=one.pair.rejected_score,
        )
        sample = samples[scored.key]
        entry = entry_of(sample, rollouts[scored.key], scored, pair, fate=one.fate, pieces=pieces)
        entry.tags = [*one.tags, *([FLIP] if entry.is_flip else [])]
        yield Found(entry, sample)


def set_aside_entries(run: ReportedRun, failures: Sequence[Failure]) -> Iterator[Found]:
    """The entries of samples that a stage set aside, those whose shard can be read."""
    by_key = {failure.key: failure for failure in failures}
    for info in run.shards():
        keys = by_key.keys() & set(info.keys)
        if not keys:
            continue
        samples = samples_of(run.run_dir, info, keys)
        for key in info.keys:
            if key in keys:
                failure = by_key[key]
                reason = f"{failure.stage}: {failure.reason}"
                yield Found(set_aside_entry(samples[key], reason, failure.detail), samples[key])


def rewards_at(
    run_dir: RunDir, info: ShardInfo, numbers: Collection[int]
) -> dict[int, SampleRewards]:
    """The rewards at these places of a shard's file."""
    found = {}
    for number, raw in enumerate(raw_records(run_dir, "rewards", info)):
        if number in numbers:
            found[number] = msgspec.msgpack.decode(raw, type=SampleRewards)
    return found


def rollouts_of(
    run_dir: RunDir, info: ShardInfo, keys: Collection[str]
) -> dict[str, SampleRollouts]:
    """The answers to these samples of a shard."""
    find = msgspec.msgpack.Decoder(Keyed)
    found = {}
    for raw in raw_records(run_dir, "rollouts", info):
        if (key := find.decode(raw).key) in keys:
            found[key] = msgspec.msgpack.decode(raw, type=SampleRollouts)
    return found


def raw_records(run_dir: RunDir, stage: str, info: ShardInfo) -> Iterator[msgspec.Raw]:
    """The records of a result file, undecoded."""
    return read_results(run_dir.result(stage, info.index), msgspec.Raw)  # type: ignore[type-var]


def samples_of(run_dir: RunDir, info: ShardInfo, keys: Collection[str]) -> dict[str, Sample]:
    """These samples of a shard, with their pictures."""
    found: dict[str, Sample] = {}
    for sample in read_shard(run_dir.shard(info.index), info, verify=False):
        if len(found) == len(keys):
            break
        if sample.key in keys:
            found[sample.key] = sample
    return found
