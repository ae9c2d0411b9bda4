"""Where a run stands, derived from its files alone: the same from any node, whoever asks.

Knows how to count and to name problems, not how to do anything about them. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from stream_engine.config import STAGES
from stream_engine.errors import ShardReadError
from stream_engine.records import Failure
from stream_engine.run_dir.manifest import count_pictures
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_quarantine
from stream_engine.run_dir.rounds import answering_model, num_rejected_in
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.sealed import read_sealed
from stream_engine.run_dir.served import ServerUse, servers_of
from stream_engine.run_dir.state import SHARD_LEASE, RunState
from stream_engine.store.base import Location

MAX_NAMED = 20


class SampleCounts(msgspec.Struct, frozen=True):
    """total = done + quarantined + pending. Records that ingest rejected count as quarantined."""

    total: int = 0
    done: int = 0
    quarantined: int = 0
    pending: int = 0


class ShardCounts(msgspec.Struct, frozen=True):
    """total = done + failed + running + pending."""

    total: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    pending: int = 0


class StageCounts(msgspec.Struct, frozen=True):
    """Shards done, and samples with a result or set aside, at one stage."""

    shards_done: int = 0
    samples_done: int = 0
    quarantined: int = 0


class PairCounts(msgspec.Struct, frozen=True):
    """Of the last merge: candidates = written + dropped."""

    candidates: int = 0
    written: int = 0
    dropped: dict[str, int] = {}
    given: dict[str, int] = {}
    """Pairs that the input had made, by what the scorer says of their order; {} without any."""


class WorkerStatus(msgspec.Struct, frozen=True):
    """A live lease: who holds what. `is_alive` is None when its host cannot be seen from here."""

    worker: str
    host: str
    holds: str
    shard: int | None
    since_s: float
    heartbeat_s: float
    is_alive: bool | None


class WaitingShard(msgspec.Struct, frozen=True):
    """A shard that failed and is tried again when its back-off is over."""

    shard: int
    retry_in_s: float
    error: str


class RoundStatus(msgspec.Struct, frozen=True):
    """A round of a run that has several: total = done + quarantined + pending, of its samples."""

    round: int
    instruct_model: str
    samples: SampleCounts
    failed_shards: int = 0
    pairs: int = 0
    """Of the last merge."""
    rejected: int = 0
    """Records that came to no sample when this round read the inputs."""


class Status(msgspec.Struct, frozen=True):
    """What `status --json` prints."""

    samples: SampleCounts
    shards: ShardCounts
    stages: dict[str, StageCounts]
    pairs: PairCounts
    pictures: dict[int, int]
    """Number of pictures -> samples with as many."""
    workers: list[WorkerStatus]
    waiting: list[WaitingShard] = []
    """What a run waits for when nobody is at work; the first MAX_NAMED of them, soonest first."""
    servers: dict[str, ServerUse] = {}
    """By role, the models on servers that were asked, and how much."""
    rounds: list[RoundStatus] = []
    """Of a run that has several."""

    @property
    def has_problems(self) -> bool:
        return bool(self.shards.failed or self.samples.quarantined)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to work on: each shard is done or failed for good."""
        return self.shards.running == self.shards.pending == 0


def collect(state: RunState) -> Status:
    """Count a run as of its last refresh."""
    stages: dict[str, StageCounts] = {}
    complete = {
        stage: [state.is_complete(stage, shard) for shard in state.shards] for stage in STAGES
    }
    for stage in STAGES:
        headers = list(state.headers(stage))
        stages[stage] = StageCounts(
            shards_done=sum(complete[stage]),
            samples_done=sum(header.num_results for header in headers),
            quarantined=sum(header.num_quarantined for header in headers),
        )
    total = sum(shard.num_samples for shard in state.shards) + state.num_rejected()
    quarantined = state.num_rejected() + sum(counts.quarantined for counts in stages.values())
    done = stages[STAGES[-1]].samples_done
    holders = state.holders()
    kinds = Counter(
        "done"
        if all(of_stages) and not state.is_failed(shard)
        else "running"
        if shard.index in holders
        else "failed"
        if state.is_failed(shard)
        else "pending"
        for shard, *of_stages in zip(state.shards, *complete.values())
    )
    return Status(
        samples=SampleCounts(total, done, quarantined, total - done - quarantined),
        shards=ShardCounts(total=len(state.shards), **kinds),
        stages=stages,
        pairs=read_pairs(state.run_dir),
        pictures=count_pictures(shard.images for shard in state.shards),
        workers=[
            WorkerStatus(
                worker=lease.worker_id,
                host=lease.host,
                holds=lease.name,
                shard=shard_of(lease.name),
                since_s=round(lease.held_s, 1),
                heartbeat_s=round(lease.age_s, 1),
                is_alive=lease.is_alive,
            )
            for lease in state.leases
        ],
        waiting=waiting_shards(state),
        servers=servers_of(state),
        rounds=list(rounds_of(state)),
    )


def rounds_of(state: RunState) -> Iterator[RoundStatus]:
    """How each round stands; none where there is one."""
    numbers = range(1, state.fingerprints.at_hand + 1)
    if len(numbers) < 2:
        return
    told = {one["round"]: one["pairs"] for one in read_stats(state.run_dir).get("rounds", [])}
    rejected = num_rejected_in(state.manifest.num_rejected.values(), state.fingerprints.firsts)
    for number, one in zip(numbers, read_run_file(state.run_dir).every_round):
        shards = [state.shards[i] for i in state.fingerprints.shards_of(number, len(state.shards))]
        headers = [h for stage in STAGES for shard in shards if (h := state.header(stage, shard))]
        total = sum(shard.num_samples for shard in shards)
        done = sum(h.num_results for h in headers if h.stage == STAGES[-1])
        aside = sum(h.num_quarantined for h in headers)
        yield RoundStatus(
            round=number,
            instruct_model=answering_model(one.settings),
            samples=SampleCounts(total, done, aside, total - done - aside),
            failed_shards=sum(map(state.is_failed, shards)),
            pairs=told.get(number, 0),
            rejected=rejected[number - 1],
        )


def waiting_shards(state: RunState) -> list[WaitingShard]:
    """The shards that wait for their next attempt, soonest first."""
    found = [
        WaitingShard(shard.index, round(wait_s, 1), state.failures[shard.index].error)
        for shard in state.shards
        if (wait_s := state.wait_s(shard)) and not state.is_failed(shard)
    ]
    return sorted(found, key=lambda one: one.retry_in_s)[:MAX_NAMED]


def read_stats(run_dir: RunDir) -> dict[str, Any]:
    """stats.json of the last merge; {} before one, and when it is damaged."""
    return read_sealed(run_dir.stats_json) or {}


def read_pairs(run_dir: RunDir) -> PairCounts:
    """The pair counts of the last merge."""
    stats = read_stats(run_dir)
    pairs = stats.get("pairs", {})
    return PairCounts(
        candidates=pairs.get("candidates", 0),
        written=pairs.get("written", 0),
        dropped=pairs.get("dropped", {}),
        given=stats.get("given_pairs", {}),
    )


def no_pairs(run_dir: RunDir) -> str | None:
    """Why the last merge wrote no pair though samples were scored; None when that is not so."""
    stats = read_stats(run_dir)
    if not stats or stats["pairs"]["written"] or not stats["samples"]["scored"]:
        return None
    found = f"no pair was written of {stats['samples']['scored']} scored samples: "
    candidates, dropped = stats["pairs"]["candidates"], stats["pairs"]["dropped"]
    if not candidates:
        return found + (
            "none has two answers that make one (equal scores, near duplicates, or lengths that "
            "differ by --distance words or more)"
        )
    reason = max(dropped, key=lambda why: dropped[why])
    return found + f"all {candidates} candidates were dropped, {dropped[reason]} as {reason}"


def problems(state: RunState, *, limit: int = MAX_NAMED) -> list[str]:
    """Every failed shard and quarantined record in one line each; beyond `limit`, where to look."""
    failed = [shard for shard in state.shards if state.is_failed(shard)]
    lines = []
    for shard in islice(failed, limit):
        failure = state.failures[shard.index]
        where = f"{failure.source}, member {failure.member}" if failure.member else failure.source
        reason = failure.error.removeprefix(f"{where}: ")
        lines.append(f"shard {shard.index} ({where}): {reason} ({failure.attempts} attempts)")
    if len(failed) > limit:
        lines.append(f"... {len(failed) - limit} more shards; see {state.run_dir.failures_dir}")
    total = state.num_rejected() + sum(state.num_quarantined(stage) for stage in STAGES)
    named = list(islice(quarantined(state), limit)) if total else []
    lines.extend(describe_failure(failure) for failure in named)
    if total > len(named):
        lines.append(f"... {total - len(named)} more records; see {state.run_dir.quarantine_dir}")
    return lines


def quarantined(state: RunState) -> Iterator[Failure]:
    """Every record that was set aside: those of the inputs, then those of each stage.

    A file that is lost or damaged is passed over; `validate` names it.
    """
    names = [header.quarantine for header in state.headers() if header.quarantine]
    for path in rejects_files(state) + [state.run_dir.quarantine(name) for name in names]:
        with suppress(ShardReadError):
            yield from read_quarantine(path)


def rejects_files(state: RunState) -> list[Location]:
    """The files of the records that were rejected when the inputs were read."""
    names = [info.quarantine for info in state.manifest.inputs.values() if info.quarantine]
    return [state.run_dir.quarantine(name) for name in names]


def describe_failure(failure: Failure) -> str:
    """A quarantined record in one line: file, row, id, reason."""
    place = f"{failure.source} row {failure.row}" if failure.row >= 0 else failure.source
    who = f" (idx {failure.idx})" if failure.idx else ""
    detail = f": {failure.detail}" if failure.detail else ""
    return f"{failure.stage}: {place}{who}: {failure.reason}{detail}"


def shard_of(lease_name: str) -> int | None:
    name = lease_name.removeprefix(SHARD_LEASE)
    return int(name) if name != lease_name and name.isdecimal() else None
