"""The retry policy: how a shard is tried, what becomes of what it raises, when a worker gives up.

A shard that raises is tried again after a back-off, by whoever comes first. On the last attempt its
records are processed one by one and those that raise are quarantined; when every one does, the
shard is left as failed. A worker that loses its device (CUDA answers every call with the error of
an earlier one) records the attempt, gives its shard back and ends: the others go on, and a launcher
that restarts it gives it a new device context.

A worker may also be killed at a shard: by the kernel for memory, by a crash in a library, or since
its machine was taken away. It leaves its lease; whoever takes that over notes the death. The shard
then comes after those that ended fewer workers, so that a record that kills its worker does not
keep the other shards from being done. After five deaths its records are processed one by one, each
noted before it is begun, and a record at which two workers died is quarantined. Preemption makes no
shard fail: deaths are no attempts, and they are counted by the record at which they came.
"""

from __future__ import annotations

import functools
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from stream_engine.config import Stage, WorkerConfig
from stream_engine.errors import (
    DeviceLostError,
    LeaseLostError,
    ServerError,
    ShardError,
    StreamEngineError,
    WorkerDiedError,
)
from stream_engine.records import Failure
from stream_engine.run_dir.failures import (
    MAX_DEATHS_ALONE,
    ShardFailure,
    clear_failure,
    note_alone,
    record_failure,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import RunState, Shard
from stream_engine.store.leases import Holder
from stream_engine.text import describe
from stream_engine.work.catching import UNMENDABLE, caught, is_device_lost
from stream_engine.work.shard_work import Process, ShardWork, StageRecord

logger = logging.getLogger(__name__)

MAX_HOPELESS_SHARDS = 2
ALONE_S = 60.0


class Way(msgspec.Struct, frozen=True):
    """How a shard is tried this time."""

    process: Process
    is_last: bool
    is_first: bool
    """Nothing went wrong at this shard so far."""


class Attempts:
    """What one worker tries, and how it went."""

    def __init__(
        self,
        state: RunState,
        fingerprints: Mapping[Stage, str],
        settings: WorkerConfig,
        worker: str,
    ) -> None:
        self.state = state
        self.run_dir = state.run_dir
        self.fingerprints = fingerprints
        self.settings = settings
        self.worker = worker
        self.num_hopeless = 0
        self.last_error: Exception | None = None
        self.last_company = time.monotonic()

    def way(self, shard: Shard) -> Way:
        """How a shard is to be tried now: together, or one record after the other."""
        failure = self.state.failure(shard)
        max_retries = self.settings.max_shard_retries
        is_last = failure is not None and failure.attempts >= max_retries
        process: Process = ShardWork.outcomes
        if failure is not None and failure.needs_isolation(max_retries):
            process = Isolation(note_alone(self.run_dir, failure, ""))
        return Way(process, is_last, is_first=failure is None)

    def settle(self, shard: Shard, stage: Stage, error: object, way: Way) -> bool:
        """Record how an attempt ended; returns whether the shard is done.

        Raises:
            DeviceLostError: when this process can compute no more.
            ConfigError, CheckpointError, ParallelError: whatever no retry can mend.
        """
        if isinstance(error, UNMENDABLE):
            raise error
        if isinstance(error, LeaseLostError):
            logger.warning("%s; its result is left to the other worker", error)
            return False
        if isinstance(error, Exception):
            is_lost = is_device_lost(error)
            self.record(shard, stage, error, ended_worker=is_lost)
            if is_lost:
                raise DeviceLostError(
                    f"this worker's device was lost at shard {shard.index} and only a new process "
                    f"can use it again, so run the same command: {str(error).splitlines()[0]}"
                ) from error
            self.num_hopeless += way.is_last and not isinstance(error, ShardError)
            self.last_error = error
            return False
        self.num_hopeless = 0
        clear_failure(self.run_dir, shard.index)
        logger.info("shard %d done", shard.index)
        return True

    @property
    def are_hopeless(self) -> bool:
        """Whether this worker (a lost GPU, a full disk) fails whatever it touches.

        It then takes no more shards, so that it cannot spoil those of the others, and waits.
        """
        return self.num_hopeless >= MAX_HOPELESS_SHARDS

    def give_up_when_alone(self, num_workers: int, *, is_settled: bool) -> None:
        """Raise the last error of a hopeless worker when nobody else is at work.

        Raises:
            StreamEngineError: then.
        """
        if self.state.holders():
            self.last_company = time.monotonic()
        patience_s = ALONE_S if num_workers > 1 else 0.0
        if not is_settled and time.monotonic() - self.last_company > patience_s:
            assert self.last_error is not None
            raise StreamEngineError(
                f"no record of {self.num_hopeless} shards in a row could be processed here; the "
                f"last error was {describe(self.last_error)}. When it is mended, "
                f"`stream-engine retry-failed {shlex.quote(str(self.run_dir.root))}` goes on"
            ) from self.last_error

    def record_death(self, stages: tuple[Stage, ...], shard: Shard, dead: Holder) -> None:
        """Note that a worker ended while it held a shard; the shard is tried later."""
        self.state.refresh_shard(shard)
        left = [stage for stage in stages if not self.state.is_complete(stage, shard)]
        if left and not self.state.is_failed(shard):
            error = WorkerDiedError(f"the worker that held this shard died: {dead.worker_id}")
            self.record(shard, left[0], error, ended_worker=True)
            self.state.refresh_shard(shard)

    def record(
        self, shard: Shard, stage: Stage, error: Exception, *, ended_worker: bool = False
    ) -> None:
        failure = record_failure(
            self.run_dir,
            error,
            shard=shard.index,
            stage=stage,
            fingerprint=self.fingerprints[stage],
            worker=self.worker,
            config=self.settings,
            ended_worker=ended_worker,
        )
        tries = self.settings.max_shard_retries + 1
        which = f"attempt {failure.attempts} of {tries}"
        if ended_worker:
            which = f"{failure.num_deaths} workers ended at it, it is put last"
        text = "shard %d failed at %s (%s): %s"
        logger.warning(text, failure.shard, failure.stage, which, failure.error)
        logger.debug("%s", failure.traceback)


class Isolation:
    """Makes outcomes one input at a time: what raises is a Failure, unless the whole shard does.

    So is what ended its workers. `failure` is the shard's, in which the input at work is noted.
    """

    def __init__(self, failure: ShardFailure) -> None:
        self.failure = failure

    def note(self, run_dir: RunDir, key: str) -> None:
        self.failure = note_alone(run_dir, self.failure, key)

    def __call__(
        self, work: ShardWork, inputs: Mapping[str, Any]
    ) -> Iterator[StageRecord | Failure]:
        if self.failure.stage != work.stage:
            self.failure = self.failure.at_stage(work.stage, work.fingerprints[work.stage])
        raised: list[tuple[str, Exception]] = []
        num_good = work.num_kept
        for key, item in inputs.items():
            if (num_deaths := self.failure.deaths.get(key, 0)) >= MAX_DEATHS_ALONE:
                ended = f"{num_deaths} workers ended while they processed it alone"
                detail = f"{ended}: {self.failure.error}"
                yield work.named(Failure(reason="ends_worker", detail=detail, key=key))
                continue
            self.note(work.run_dir, key)
            outcomes = caught(functools.partial(lambda one: list(work.outcomes(one)), {key: item}))
            if isinstance(outcomes, Exception):
                if isinstance(outcomes, (*UNMENDABLE, ServerError)) or is_device_lost(outcomes):
                    raise outcomes  # no record is to blame
                raised.append((key, outcomes))
            else:
                num_good += 1
                yield from outcomes
        self.note(work.run_dir, "")
        if raised and not num_good:
            raise raised[-1][1]
        for key, error in raised:
            yield work.named(Failure(reason="error", detail=describe(error), key=key))
