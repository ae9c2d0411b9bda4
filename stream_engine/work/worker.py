"""A worker: lease -> read -> process -> write -> release, until nothing is left; then one merges.

Plain python, torchrun and deepspeed run the same loop. Workers meet in the run directory only: no
process group, no barrier, and the number of workers shapes no result. A run is resumed by running
it again; a finished run is a no-op that loads no model.

Retry policy: a shard that raises is tried again after a back-off, by whoever comes first. On the
last attempt its records are processed one by one and those that raise are quarantined; when every
one does, the shard is left as failed. A worker that loses its device (CUDA answers every call with
the error of an earlier one) records the attempt, gives its shard back and ends: the others go on,
and a launcher that restarts it gives it a new device context.

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
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from stream_engine.config import InputConfig, RunConfig, Stage, WorkerConfig
from stream_engine.work.progress import ProgressView
from stream_engine.errors import (
    CheckpointError,
    ConfigError,
    DeviceLostError,
    LeaseLostError,
    MissingStageError,
    ParallelError,
    ShardError,
    StreamEngineError,
    WorkerDiedError,
)
from stream_engine.run_dir.failures import (
    MAX_DEATHS_ALONE,
    ShardFailure,
    clear_failure,
    note_alone,
    record_failure,
)
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.meter import Meter
from stream_engine.config import STAGES
from stream_engine.pipelines.base import Pipeline
from stream_engine.work.placement import decide_placement, worker_memory
from stream_engine.ranks import Rank, set_device
from stream_engine.records import Failure, Sample
from stream_engine.run_dir.state import RunState, Shard, shard_lease
from stream_engine.text import describe
from stream_engine.work.shard_work import Process, ShardWork, StageRecord
from stream_engine.inputs.ingest import IngestReport, ingest
from stream_engine.inputs.sources import input_fingerprint
from stream_engine.store.locations import canonical_source
from stream_engine.store.leases import Holder, Lease, list_leases
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import read_shard

if TYPE_CHECKING:
    from stream_engine.work.team import Team

logger = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_S = 0.25
REFRESH_S = 1.0
MAX_HOPELESS_SHARDS = 2
ALONE_S = 60.0
TROUBLE_WAIT_S = 1.0
TROUBLE_PATIENCE_S = 300.0
"""How long the run directory may fail a worker that gets nothing done: a file server's restart."""
MIN_RECORDS_TO_JUDGE = 200

PASSES: dict[int | None, tuple[tuple[Stage, ...], ...]] = {
    None: (("rollouts", "rewards"),),
    0: (("rollouts",),),
    1: (("rewards",),),
    2: (),
}
"""Stages that are done together on a shard, by --run_stage."""

UNMENDABLE = (ConfigError, CheckpointError, ParallelError)
"""Errors of settings, models or lost ranks: they stop the run, since no retry can mend them."""


class Worker:
    """One process of a run. `work` returns when every shard is settled, whoever did it."""

    def __init__(
        self,
        run_dir: RunDir,
        config: RunConfig,
        pipeline: Pipeline,
        fingerprints: Mapping[Stage, str],
        *,
        rank: Rank,
        view: ProgressView,
        team: Team | None = None,
    ) -> None:
        """`team` is given when this rank leads others with which it holds each model together."""
        self.run_dir = run_dir
        self.config = config
        self.settings = config.part(WorkerConfig)
        self.pipeline = pipeline
        self.fingerprints = fingerprints
        self.rank = rank
        self.team = team
        self.view = view
        self.passes = PASSES[config.run_stage]
        self.state = RunState(
            run_dir, fingerprints, max_shard_retries=self.settings.max_shard_retries
        )
        self.engines = LoadedEngines(run_dir, pipeline, rank, team)
        self.meter = Meter([stage for stages in self.passes for stage in stages])
        self.current_pass = self.passes[0] if self.passes else ()
        self.is_placed = False
        self.unread: dict[str, str] = {}
        self.limits: dict[str, int | None] = {}
        self.manifest_start = 0
        self.num_added = 0
        self.num_hopeless = 0
        self.last_error: Exception | None = None
        self.last_company = time.monotonic()
        self.trouble_since: float | None = None
        self.reserved: tuple[tuple[Stage, ...], Shard, Lease] | None = None

    def work(self, *, read_input: bool = True, do_shards: bool = True) -> int:
        """Ingest what is new and work on shards until all are settled; returns how many were mine.

        Raises:
            ConfigError: for settings or data that are plainly wrong.
            CheckpointError: when a model cannot be loaded.
        """
        self.state.refresh()
        if read_input and self.config.run_stage in (None, 0):
            self.unread = {path: input_fingerprint(path) for path in self.config.dataset_path}
            self.take_up_forgotten_inputs()
        self.manifest_start = self.state.manifest.end
        try:
            return self.work_until_settled(do_shards=do_shards)
        finally:
            self.release_reserved()

    def work_until_settled(self, *, do_shards: bool) -> int:
        """The loop of a worker.

        Raises:
            OSError: when the file system has failed it for minutes, and it could do nothing else.
        """
        num_mine = num_idle = 0
        while True:
            # The first time that there seems to be nothing to do, look again at once.
            max_age_s = {0: REFRESH_S, 1: 0.0}.get(num_idle, IDLE_S)
            try:
                is_ingested = self.ingest()
                self.state.refresh(max_age_s=max_age_s)
                self.check_bad_fraction()
                task = self.next_task() if do_shards and not self.is_broken() else None
                num_mine += self.do(*task) if task is not None else 0
            except BrokenPipeError:
                raise
            except OSError as error:
                self.sit_out(error)
                continue
            self.trouble_since = None
            num_idle = 0 if task is not None else num_idle + 1
            if num_idle > 1:
                if is_ingested and (self.is_settled() or not do_shards):
                    return num_mine
                self.show("waiting for other workers")
                time.sleep(IDLE_S)

    def sit_out(self, error: OSError) -> None:
        """Wait for a file system that fails: a while, longer each time, and not for ever."""
        now = time.monotonic()
        self.trouble_since = now if self.trouble_since is None else self.trouble_since
        lasted_s = now - self.trouble_since
        if lasted_s > TROUBLE_PATIENCE_S:
            raise error
        wait_s = min(max(lasted_s, TROUBLE_WAIT_S), 30 * TROUBLE_WAIT_S)
        logger.warning("%s; looking again in %.0f s", describe(error), wait_s)
        time.sleep(wait_s)

    def is_settled(self) -> bool:
        """Whether no shard is left to do, by anybody."""
        return all(
            self.state.is_settled(stages, shard)
            for stages in self.passes
            for shard in self.state.shards
        )

    # -- input -----------------------------------------------------------------------------------

    def ingest(self) -> bool:
        """Read inputs that nobody has read yet; False while another worker is at it."""
        if not self.unread_sources():
            return True
        lease = self.lease("ingest")
        if lease is None:
            return False
        with lease:
            self.state.refresh()
            sources = self.unread_sources()
            named = [source for source in sources if source not in self.limits]
            for group in (named, *([source] for source in sources if source in self.limits)):
                if group:
                    logger.info("reading %s", ", ".join(group))
                    report = ingest(
                        self.run_dir,
                        group,
                        self.reading_settings(group[0]),
                        on_progress=self.ingest_progress,
                    )
                    logger.info("%s", describe_ingest(report))
                    self.num_added += report.added
        self.unread = {}
        return True

    def unread_sources(self) -> list[str]:
        """The inputs that are left to read.

        One that anybody has read since this worker began is not, although it may look changed from
        here, or hold files that could not be read: those are tried once a launch, not by each of
        its workers in turn.
        """
        manifest = self.state.manifest
        return [
            source
            for source, mark in self.unread.items()
            if manifest.is_left_to_read(source, mark, part := self.reading_settings(source))
            and not manifest.was_read_since(self.manifest_start, source, part)
        ]

    def take_up_forgotten_inputs(self) -> None:
        """Add the inputs that are to be read again, whoever named them: each with its own limit."""
        named = {canonical_source(source) for source in self.unread}
        for source, info in self.state.manifest.inputs.items():
            if not info.fingerprint and source not in named:
                mark = caught(functools.partial(input_fingerprint, source))
                if isinstance(mark, Exception):
                    logger.warning("its rejected records are not read again: %s", mark)
                else:
                    self.unread[source] = mark
                    self.limits[source] = info.max_samples

    def reading_settings(self, source: str) -> InputConfig:
        part = self.config.part(InputConfig)
        if source in self.limits:
            part = msgspec.structs.replace(part, max_samples=self.limits[source])
        return part

    def ingest_progress(self, report: IngestReport) -> None:
        """Show how far reading is, and stop it when the data are plainly wrong."""
        rejected = sum(report.rejected.values())
        refuse_bad_input(report.rejected, report.read, self.settings.max_bad_fraction)
        self.show(f"reading input: {report.read} records, {rejected} rejected")

    def check_bad_fraction(self) -> None:
        """Stop early when too large a share was rejected by the reader or set aside by the stages.

        Each is judged by what it has looked at: the input may be read long before a stage begins.
        """
        limit = self.settings.max_bad_fraction
        inputs = self.state.manifest.inputs.values()
        rejected = sum((Counter(info.rejected) for info in inputs), Counter[str]())
        refuse_bad_input(rejected, sum(info.read for info in inputs), limit)
        headers = [h for s in self.state.shards if (h := self.state.header("rollouts", s))]
        aside = {stage: self.state.num_quarantined(stage) for stage in STAGES}
        refuse_bad_samples(aside, sum(header.num_samples for header in headers), limit)

    # -- shards ----------------------------------------------------------------------------------

    def next_task(self) -> tuple[tuple[Stage, ...], Shard, Lease] | None:
        """A shard with work left, and its lease; the models in memory decide which pass first."""
        if self.reserved is not None:
            task, self.reserved = self.reserved, None
            return task
        if not self.is_placed and not self.is_settled():
            self.place()
        return self.take()

    def take(self) -> tuple[tuple[Stage, ...], Shard, Lease] | None:
        """Lease a shard with work left."""
        others = [stages for stages in self.passes if stages != self.current_pass]
        held = self.state.holders()
        for stages in (self.current_pass, *others) if self.passes else ():
            for shard in self.in_order():
                if shard.index not in held and self.is_takeable(stages, shard):
                    lease = self.lease(shard_lease(shard.index))
                    if lease is None:
                        continue
                    if lease.taken_from is None:
                        return stages, shard, lease
                    with lease:
                        self.record_death(stages, shard, lease.taken_from)
        return None

    def record_death(self, stages: tuple[Stage, ...], shard: Shard, dead: Holder) -> None:
        """Note that a worker ended while it held a shard; the shard is tried later."""
        self.state.refresh_shard(shard)
        left = [stage for stage in stages if not self.state.is_complete(stage, shard)]
        if left and not self.state.is_failed(shard):
            error = WorkerDiedError(f"the worker that held this shard died: {dead.worker_id}")
            self.record(shard, left[0], error, ended_worker=True)
            self.state.refresh_shard(shard)

    def look_ahead(self, stages: tuple[Stage, ...]) -> Iterator[Sample]:
        """The next shard's samples; it is leased when the first of them is asked for.

        Whatever fails here fails again, by its name, when that shard's turn comes.
        """
        if not self.looks_ahead() or self.reserved is not None:
            return
        found = caught(self.take)
        if found is None or isinstance(found, Exception):
            return
        self.reserved = found
        index = found[1].index
        if found[0] != stages or self.run_dir.result("rollouts", index).exists():
            return
        if self.state.failure(found[1]) is not None:
            return  # it may kill this worker: not while another shard is in its hands
        info = self.state.manifest.shards[index]
        samples = caught(lambda: list(read_shard(self.run_dir.shard(index), info)))
        if isinstance(samples, Exception):
            logger.debug("shard %d is not begun early: %s", index, samples)
        else:
            logger.debug("shard %d is begun early", index)
            yield from samples

    def looks_ahead(self) -> bool:
        """Whether this worker begins shards early; ranks that hold a model together do not."""
        asked = self.settings.look_ahead
        if self.team is not None or asked == "never":
            return False
        return asked == "always" or set_device(self.rank, self.config.device) != "cpu"

    def release_reserved(self) -> None:
        """Give back the shard that was leased ahead, for others to take."""
        if self.reserved is not None:
            self.reserved[2].release()
            self.reserved = None

    def place(self) -> None:
        """Decide whether the models are held together; if not, the stages run one by one."""
        self.is_placed = True
        device = set_device(self.rank, self.config.device)
        config = self.config
        memory = worker_memory(
            device, local_workers=self.rank.local_world_size, offload=config.offload
        )
        placement = decide_placement(self.pipeline, config, memory_bytes=memory, device=device)
        logger.info("%s", placement.line())
        if not placement.together:
            self.engines.one_at_a_time = True
            self.passes = tuple((stage,) for stages in self.passes for stage in stages)
            self.current_pass = self.passes[0] if self.passes else ()

    def in_order(self) -> list[Shard]:
        """This rank's own shards first, then those of others from the end; deadly ones later."""
        size, number = max(1, self.rank.num_workers), self.rank.worker
        own = [s for s in self.state.shards if s.index % size == number % size]
        others = [s for s in self.state.shards if s.index % size != number % size]
        failures = self.state.failures
        return sorted(
            own + others[::-1],
            key=lambda s: failures[s.index].num_deaths if s.index in failures else 0,
        )

    def is_takeable(self, stages: tuple[Stage, ...], shard: Shard) -> bool:
        state = self.state
        return (
            not state.is_settled(stages, shard)
            and state.wait_s(shard) == 0
            and (stages[0] == "rollouts" or state.is_complete("rollouts", shard))
        )

    def do(self, stages: tuple[Stage, ...], shard: Shard, lease: Lease) -> bool:
        """Do what is left of a shard under its lease; returns whether it is done now."""
        with lease:
            self.current_pass = stages
            # Another worker may have finished it before the lease was ours.
            self.state.refresh_shard(shard)
            left = [stage for stage in stages if not self.state.is_complete(stage, shard)]
            if not left or self.state.is_failed(shard):
                return False
            try:
                return self.attempt(left, shard, lease)
            finally:
                self.state.refresh_shard(shard)

    def attempt(self, left: Sequence[Stage], shard: Shard, lease: Lease) -> bool:
        """Try once; a failure is recorded, and the run goes on."""
        failure = self.state.failure(shard)
        max_retries = self.settings.max_shard_retries
        is_last = failure is not None and failure.attempts >= max_retries
        process: Process = ShardWork.outcomes
        ahead: Iterable[Sample] = ()
        if failure is not None and failure.needs_isolation(max_retries):
            failure = note_alone(self.run_dir, failure, "")
            process = functools.partial(isolated, failure=failure)
        else:
            # A shard that may kill this worker is blamed alone: no other is leased beside it.
            ahead = self.look_ahead(self.current_pass) if failure is None else ()
        work = self.shard_work(left, shard, lease, ahead)
        with self.meter.shard():
            error = caught(functools.partial(work.do, left, process))
        if isinstance(error, UNMENDABLE):
            raise error
        if isinstance(error, LeaseLostError):
            logger.warning("%s; its result is left to the other worker", error)
            return False
        if isinstance(error, Exception):
            is_lost = is_device_lost(error)
            self.record(shard, work.stage, error, ended_worker=is_lost)
            if is_lost:
                raise DeviceLostError(
                    f"this worker's device was lost at shard {shard.index} and only a new process "
                    f"can use it again, so run the same command: {str(error).splitlines()[0]}"
                ) from error
            self.num_hopeless += is_last and not isinstance(error, ShardError)
            self.last_error = error
            return False
        self.num_hopeless = 0
        clear_failure(self.run_dir, shard.index)
        logger.info("shard %d done", shard.index)
        return True

    def is_broken(self) -> bool:
        """Whether this worker (a lost GPU, a full disk) fails whatever it touches.

        It then takes no more shards, so that it cannot spoil those of the others, and waits.

        Raises:
            StreamEngineError: when it is broken and nobody else is at work.
        """
        if self.num_hopeless < MAX_HOPELESS_SHARDS:
            return False
        self.release_reserved()
        if self.state.holders():
            self.last_company = time.monotonic()
        patience_s = ALONE_S if self.rank.num_workers > 1 else 0.0
        if not self.is_settled() and time.monotonic() - self.last_company > patience_s:
            assert self.last_error is not None
            raise StreamEngineError(
                f"no record of {self.num_hopeless} shards in a row could be processed here; the "
                f"last error was {describe(self.last_error)}. When it is mended, "
                f"`stream-engine retry-failed {self.run_dir.root}` goes on"
            ) from self.last_error
        return True

    def do_in_foreground(self, index: int) -> None:
        """Do what is left of one shard now, whatever its failures; its error rises as it is.

        Raises:
            ConfigError: when there is no such shard, or another worker holds it.
        """
        self.state.refresh()
        if not 0 <= index < len(self.state.shards):
            raise ConfigError(f"no shard {index}: the run has {len(self.state.shards)}")
        shard = self.state.shards[index]
        lease = self.lease(shard_lease(index))
        if lease is None:
            raise ConfigError(f"another worker is at shard {index}")
        with lease:
            failure = self.state.failure(shard)
            if failure is not None and failure.damaged == "tar":
                list(read_shard(self.run_dir.shard(index), self.state.manifest.shards[index]))
            for stages in self.passes:
                left = [stage for stage in stages if not self.state.is_complete(stage, shard)]
                if left:
                    self.current_pass = stages
                    self.shard_work(left, shard, lease).do(left, ShardWork.outcomes)
            clear_failure(self.run_dir, index)

    def shard_work(
        self,
        left: Sequence[Stage],
        shard: Shard,
        lease: Lease,
        ahead: Iterable[Sample] = (),
    ) -> ShardWork:
        return ShardWork(
            self.run_dir,
            self.pipeline,
            self.fingerprints,
            self.state.manifest.shards[shard.index],
            lease=lease,
            engines=self.engines.get(left, keep=self.current_pass),
            tick=self.tick,
            team=self.team,
            ahead=ahead,
        )

    def record(
        self, shard: Shard, stage: Stage, error: Exception, *, ended_worker: bool = False
    ) -> None:
        failure = record_failure(
            self.run_dir,
            error,
            shard=shard.index,
            stage=stage,
            fingerprint=self.fingerprints[stage],
            worker=self.rank.worker_id,
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

    # -- small parts -----------------------------------------------------------------------------

    def lease(self, name: str) -> Lease | None:
        return Lease.acquire(
            self.run_dir.leases_dir,
            name,
            worker_id=self.rank.worker_id,
            timeout_s=self.settings.lease_timeout_s,
        )

    def tick(self, outcomes: int, tokens: int) -> None:
        self.meter.made(outcomes, tokens)
        self.show("working")

    def show(self, doing: str) -> None:
        if self.view.is_due():
            with suppress(OSError):  # what is shown may be old; the work goes on
                self.state.refresh(max_age_s=REFRESH_S)
            self.view.update(self.meter.progress(self.state, doing))


def is_device_lost(error: Exception) -> bool:
    """Whether a model's code raised what says that this process can compute no more."""
    if not isinstance(error, RuntimeError):
        return False
    from stream_engine import device_errors  # imports torch

    return device_errors.is_device_lost(error)


def isolated(
    work: ShardWork, inputs: Mapping[str, Any], *, failure: ShardFailure
) -> Iterator[StageRecord | Failure]:
    """Outcomes one input at a time: what raises becomes a Failure, unless the whole shard does.

    So does what ended its workers; `failure` is the shard's, in which the input at work is noted.
    """
    if failure.stage != work.stage:
        failure = failure.at_stage(work.stage, work.fingerprints[work.stage])
    raised: list[tuple[str, Exception]] = []
    num_good = work.num_kept
    for key, item in inputs.items():
        if (num_deaths := failure.deaths.get(key, 0)) >= MAX_DEATHS_ALONE:
            detail = f"{num_deaths} workers ended while they processed it alone: {failure.error}"
            yield work.named(Failure(reason="ends_worker", detail=detail, key=key))
            continue
        failure = note_alone(work.run_dir, failure, key)
        outcomes = caught(functools.partial(lambda one: list(work.outcomes(one)), {key: item}))
        if isinstance(outcomes, Exception):
            if isinstance(outcomes, UNMENDABLE) or is_device_lost(outcomes):
                raise outcomes
            raised.append((key, outcomes))
        else:
            num_good += 1
            yield from outcomes
    note_alone(work.run_dir, failure, "")
    if raised and not num_good:
        raise raised[-1][1]
    for key, error in raised:
        yield work.named(Failure(reason="error", detail=describe(error), key=key))


def caught(work: Callable[[], T]) -> T | Exception:
    """The result of `work`, or what it raised. The one broad except of the house: whatever a
    model's code raises, a bad record or shard must not stop the others."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return error


def refuse_bad_input(rejected: Mapping[str, int], read: int, max_fraction: float) -> None:
    """Raise ConfigError when the reader rejected too large a share of the records."""
    if is_mostly_bad(rejected, read, max_fraction):
        raise ConfigError(
            f"the reader rejected {sum(rejected.values())} of the first {read} records, more than "
            f"max_bad_fraction {max_fraction:g} (most of them: {largest(rejected)}); correct the "
            "input, whose bad rows are named in quarantine/ of the work_dir, or raise "
            "--max_bad_fraction"
        )


def refuse_bad_samples(aside: Mapping[Stage, int], done: int, max_fraction: float) -> None:
    """Raise ConfigError when the stages set aside too large a share of their samples."""
    if is_mostly_bad(aside, done, max_fraction):
        raise ConfigError(
            f"{sum(aside.values())} of the first {done} samples were set aside, more than "
            f"max_bad_fraction {max_fraction:g} (most of them by {largest(aside)}); mend what "
            "quarantine/ of the work_dir names and run `stream-engine retry-failed`, or raise "
            "--max_bad_fraction"
        )


def is_mostly_bad(bad: Mapping[Any, int], looked_at: int, max_fraction: float) -> bool:
    """Whether the share of bad ones is too large; fewer than 200 are not judged."""
    return looked_at >= MIN_RECORDS_TO_JUDGE and sum(bad.values()) > max_fraction * looked_at


def largest(counts: Mapping[T, int]) -> T:
    return max(counts, key=lambda name: counts[name])


def require_rollouts(state: RunState, config: RunConfig) -> None:
    """Raise MissingStageError when a stage that --run_stage builds upon is not done."""
    for number, stage in enumerate(STAGES[: config.run_stage or 0]):
        missing = [s for s in state.shards if not state.is_settled((stage,), s)]
        if missing or not state.shards:
            what = f"{len(missing)} of {len(state.shards)} shards" if missing else "all shards"
            raise MissingStageError(
                f"--run_stage {config.run_stage} needs the {stage} of {what}; first run "
                f"`stream-engine run --run_stage {number}` with the same settings"
            )


def describe_ingest(report: IngestReport) -> str:
    """What reading brought, in one line."""
    rejected = ", ".join(f"{n} {reason}" for reason, n in sorted(report.rejected.items()))
    return (
        f"read {report.read} records: {report.added} new, {report.known} known, "
        f"{sum(report.rejected.values())} rejected" + (f" ({rejected})" if rejected else "")
    )


@contextmanager
def exit_on_sigterm(run_dir: RunDir, worker_id: str) -> Iterator[None]:
    """Let SIGTERM end the process at once, with status 143 and no lease left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as error:
        if not received and not isinstance(error, SystemExit):
            raise
        # The signal may have come while a lease was being taken, before anybody owned it.
        for lease in list_leases(run_dir.leases_dir):
            if lease.worker_id == worker_id:
                run_dir.lease(lease.name).unlink(missing_ok=True)
        if isinstance(error, SystemExit):
            raise
        # It broke into something (a lock being taken) that made an error of its own of it.
        raise SystemExit(128 + received[0]) from error
    finally:
        signal.signal(signal.SIGTERM, before)
