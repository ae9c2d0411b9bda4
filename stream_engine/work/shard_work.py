"""One shard through its stages: read, process, write. What is on file already is kept.

A stage's result may exist for a part of the samples (after `retry-failed`): only the rest is
computed, and the file is written again, old and new in the shard's order. The same path therefore
serves a first run, a resumed one and a retry.
"""

from __future__ import annotations

import functools
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from stream_engine.config import Stage
from stream_engine.errors import ModelsFailedError, ShardError
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import (
    FORWARD_ERROR,
    Failure,
    Sample,
    SampleRewards,
    SampleRollouts,
    ShardInfo,
)
from stream_engine.remote import usage
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import (
    RECORD_TYPES,
    ResultHeader,
    quarantined_by,
    read_header,
    read_results,
    write_results,
)
from stream_engine.run_dir.shards import read_shard
from stream_engine.store import files
from stream_engine.store.base import Version
from stream_engine.store.leases import Lease
from stream_engine.timing import spent_on, take

if TYPE_CHECKING:
    from stream_engine.engine import Engine
    from stream_engine.work.team import Team

logger = logging.getLogger(__name__)

StageRecord = SampleRollouts | SampleRewards
Tick = Callable[[Stage, int, int], None]
"""Called with the stage at work, and (outcomes, tokens) made since the last call."""
Process = Callable[["ShardWork", Mapping[str, Any]], Iterator[StageRecord | Failure]]
"""How inputs become outcomes: `ShardWork.outcomes`, or one that isolates what raises."""


class ShardWork:
    """The work on one shard by one worker that holds its lease."""

    def __init__(
        self,
        run_dir: RunDir,
        pipeline: Pipeline,
        fingerprints: Mapping[Stage, str],
        info: ShardInfo,
        *,
        lease: Lease,
        engines: Mapping[str, Engine],
        tick: Tick,
        team: Team | None = None,
        ahead: Iterable[Sample] = (),
    ) -> None:
        """`ahead` are samples of the next shard, which rollouts may begin; see `Pipeline`."""
        self.run_dir = run_dir
        self.pipeline = pipeline
        self.fingerprints = fingerprints
        self.info = info
        self.lease = lease
        self.engines = engines
        self.tick = tick
        self.team = team
        self.ahead = ahead
        self.stage: Stage = "rollouts"  # at work now, or when it raised
        self.num_kept = 0  # results of that stage that were on file already

    def do(self, stages: Sequence[Stage], process: Process) -> None:
        """Complete these stages, in order. Whatever a model's code raises, rises."""
        self.stage = stages[0]
        samples = self.read_samples()
        for stage in stages:
            self.complete(stage, samples, process)

    @spent_on("reading")
    def read_samples(self) -> list[Sample]:
        """The shard's samples, verified against the manifest."""
        return list(read_shard(self.run_dir.shard(self.info.index), self.info))

    def complete(self, stage: Stage, samples: Sequence[Sample], process: Process) -> None:
        """Compute what this stage lacks of the shard, and write its result file.

        Raises:
            LeaseLostError: when another worker took the shard over; nothing was written then.
            ModelsFailedError: when all of several records failed in the models' own code.
        """
        self.stage = stage
        started = time.monotonic()
        inputs = self.inputs(stage, samples)
        over = files.version_of(self.run_dir.result(stage, self.info.index))
        records, failures = self.on_file(stage, inputs.keys()) if over is not None else ({}, {})
        self.num_kept = len(records)
        missing = {k: v for k, v in inputs.items() if k not in records and k not in failures}
        if not missing and self.is_whole(stage, len(inputs)):
            return
        num_tokens = 0
        self.tick(stage, 0, 0)
        for outcome in process(self, missing):
            if isinstance(outcome, Failure):
                failures[outcome.key] = outcome
            else:
                records[outcome.key] = outcome
            made = tokens_of(outcome)
            num_tokens += made
            self.tick(stage, 1, made)
        lost = [key for key in inputs if (key in records) == (key in failures)]
        if lost:
            raise ShardError(
                f"{self.pipeline.name} gave no single outcome for {len(lost)} records of "
                f"shard {self.info.index} at stage {stage}, the first is {lost[0]}"
            )
        broken = [failure for failure in failures.values() if failure.reason == FORWARD_ERROR]
        if not records and len(broken) > 1:
            raise ModelsFailedError(
                f"no record of shard {self.info.index} came through stage {stage}; {len(broken)} "
                f"failed in a model's forward, the last with: {broken[-1].detail}"
            )
        seconds = time.monotonic() - started
        self.write(stage, inputs.keys(), records, failures, seconds, num_tokens, over)

    @spent_on("reading")
    def inputs(self, stage: Stage, samples: Sequence[Sample]) -> dict[str, Any]:
        """What reaches a stage, by key in the shard's order."""
        if stage == "rollouts":
            return {sample.key: sample for sample in samples}
        path = self.run_dir.result("rollouts", self.info.index)
        rollouts = {record.key: record for record in read_results(path, SampleRollouts)}
        return {s.key: (s, rollouts[s.key]) for s in samples if s.key in rollouts}

    @spent_on("reading")
    def on_file(
        self, stage: Stage, keys: Iterable[str]
    ) -> tuple[dict[str, StageRecord], dict[str, Failure]]:
        """Records and failures of an earlier result that still count."""
        path = self.run_dir.result(stage, self.info.index)
        wanted = set(keys)
        try:
            header = read_header(path)
            if (header.fingerprint, header.shard_sha256) != (
                self.fingerprints[stage],
                self.info.sha256,
            ):
                return {}, {}
            records = {r.key: r for r in read_results(path, RECORD_TYPES[stage]) if r.key in wanted}
            aside = quarantined_by(self.run_dir, header)
            failures = {f.key: f for f in aside if f.key in wanted and f.key not in records}
        except ShardError as error:
            logger.warning("%s; it is made again", error)
            return {}, {}
        return records, failures

    def is_whole(self, stage: Stage, num_inputs: int) -> bool:
        """Whether the result on file speaks for all inputs (its quarantine file included)."""
        path = self.run_dir.result(stage, self.info.index)
        return files.exists(path) and read_header(path).num_samples == num_inputs

    def outcomes(self, inputs: Mapping[str, Any]) -> Iterator[StageRecord | Failure]:
        """The pipeline's outcomes for these inputs."""
        if not inputs:
            return
        items = list(inputs.values())
        run: Callable[[], Iterator[StageRecord | Failure]]
        if self.stage == "rollouts":
            run = functools.partial(self.pipeline.rollouts, self.engines, items, self.ahead)
        else:
            run = functools.partial(self.pipeline.rewards, self.engines, items)
        for outcome in run() if self.team is None else self.team.lead(self.stage, items, run):
            yield self.named(outcome) if isinstance(outcome, Failure) else outcome

    def named(self, failure: Failure) -> Failure:
        """The failure with the place of its record: stage, shard, position and id."""
        row = self.info.keys.index(failure.key)
        return msgspec.structs.replace(
            failure,
            stage=self.stage,
            source=str(self.run_dir.shard(self.info.index)),
            row=row,
            idx=self.info.ids[row],
        )

    def asked_before(self, stage: Stage) -> dict[str, dict[str, int]]:
        """What the results on file have taken of servers, by role: see remote/usage.py."""
        try:
            header = read_header(self.run_dir.result(stage, self.info.index))
        except ShardError:
            return {}
        return header.created_by.get("servers", {})

    def write(
        self,
        stage: Stage,
        keys: Iterable[str],
        records: Mapping[str, StageRecord],
        failures: Mapping[str, Failure],
        seconds: float,
        num_tokens: int,
        over: Version | None,
    ) -> None:
        """Write the result, in the shard's order, if the lease still stands, and read its ends.

        `over` is the version of the result that was on file before.
        """
        order = list(keys)
        asked = usage.added(self.asked_before(stage) if over is not None else {}, usage.take())
        header = ResultHeader(
            stage=stage,
            shard=self.info.index,
            shard_sha256=self.info.sha256,
            fingerprint=self.fingerprints[stage],
            num_samples=len(order),
            num_results=len(records),
            num_quarantined=len(failures),
            created_by={
                "worker": self.lease.holder.worker_id,
                "host": socket.gethostname(),
                "python": sys.prefix,
                "seconds": round(seconds, 3),
                "tokens": num_tokens,
                "finished": time.time(),
                **({"servers": asked} if asked else {}),
                "cpu_s": {part: round(spent, 6) for part, spent in take().items()},
            },
        )
        self.lease.verify()
        with spent_on("writing"):
            write_results(
                self.run_dir,
                header,
                [records[key] for key in order if key in records],
                [failures[key] for key in order if key in failures],
                over=over,
            )
            # A disk that loses what it took fails this stage, and not the next one that reads it.
            read_header(self.run_dir.result(stage, self.info.index))


def tokens_of(outcome: Any) -> int:
    """Tokens that were generated for an outcome."""
    if isinstance(outcome, SampleRollouts):
        return sum(len(answer.token_ids) for answer in outcome.answers)
    return 0
