"""A worker: lease -> read -> process -> write -> release, until nothing is left; then one merges.

Plain python, torchrun and deepspeed run the same loop. Workers meet in the run directory only: no
process group, no barrier, and the number of workers shapes no result. A run is resumed by running
it again; a finished run is a no-op that loads no model. What is read stands in reading.py, how a
shard is tried and retried in attempts.py.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from stream_engine.config import STAGES, RunConfig, Stage, WorkerConfig
from stream_engine.errors import ConfigError, LeaseLostError
from stream_engine.pairs.rankings import rank_finished
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import Rank, set_device
from stream_engine.records import Sample
from stream_engine.run_dir.failures import clear_failure
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import Fingerprints
from stream_engine.run_dir.shards import read_shard
from stream_engine.run_dir.state import RunState, Shard, shard_lease
from stream_engine.store import files
from stream_engine.store.leases import Lease
from stream_engine.text import DENIED, describe
from stream_engine.timing import spent_on
from stream_engine.work import order
from stream_engine.work.attempts import Attempts
from stream_engine.work.catching import caught
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.meter import Meter
from stream_engine.work.placement import decide_placement, worker_memory
from stream_engine.work.progress import ProgressView
from stream_engine.work.reading import InputQueue
from stream_engine.work.shard_work import ShardWork
from stream_engine.work.team import Team

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_IDLE_S = 60.0
REFRESH_S = 1.0
TROUBLE_WAIT_S = 1.0
TROUBLE_PATIENCE_S = 300.0
"""How long the run directory may fail a worker that gets nothing done: a file server's restart."""
DENIED_PATIENCE_S = 20.0
PASSES: dict[int | None, tuple[tuple[Stage, ...], ...]] = {
    None: (("rollouts", "rewards"),),
    0: (("rollouts",),),
    1: (("rewards",),),
    2: (),
}
"""Stages that are done together on a shard, by --run_stage."""
DOING: dict[Stage, str] = {"rollouts": "sampling answers", "rewards": "scoring answers"}
"""What the live view says of a stage."""


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
        number: int | None = None,
    ) -> None:
        """`team` is given when this rank leads others with which it holds each model together;
        `number` is the round whose shards it does, without it the one at hand."""
        self.run_dir = run_dir
        self.config = config
        self.settings = config.part(WorkerConfig)
        self.pipeline = pipeline
        every_round = Fingerprints.given(fingerprints)
        self.number = every_round.at_hand if number is None else number
        self.fingerprints = every_round.of_round(self.number)
        self.rank = rank
        self.team = team
        self.view = view
        self.passes = PASSES[config.run_stage]
        self.state = RunState(
            run_dir,
            every_round,
            max_shard_retries=self.settings.max_shard_retries,
            keeps_headers=True,
        )
        self.engines = LoadedEngines(run_dir, pipeline, rank, team, self.number)
        self.meter = Meter([stage for stages in self.passes for stage in stages])
        self.current_pass = self.passes[0] if self.passes else ()
        self.is_placed = False
        self.inputs = InputQueue(self.state, config, worker=rank.worker_id, show=self.show)
        self.attempts = Attempts(
            self.state, self.fingerprints, self.settings, worker=rank.worker_id
        )
        self.trouble_since: float | None = None
        self.reserved: tuple[tuple[Stage, ...], Shard, Lease] | None = None

    def work(self, *, read_input: bool = True, do_shards: bool = True) -> int:
        """Ingest what is new and work on shards until all are settled; returns how many were mine.

        Raises:
            ConfigError: for settings or data that are plainly wrong.
            CheckpointError: when a model cannot be loaded.
        """
        self.state.refresh()
        self.inputs.begin(read_input=read_input)
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
            try:
                is_ingested = self.inputs.read()
                self.look(num_idle)
                self.inputs.check_bad_fraction()
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
                self.show(order.waited_for(self.state))
                time.sleep(self.idle_s())

    def idle_s(self) -> float:
        """Seconds that a worker waits which finds nothing to do."""
        return min(order.looks_apart_s(self.state, self.rank), LONGEST_IDLE_S)

    def look(self, num_idle: int) -> None:
        """See how the run stands; at everything, before it is believed that nothing is left."""
        was_settled = num_idle > 1 and self.is_settled()
        if num_idle == 0:
            self.state.refresh(max_age_s=max(REFRESH_S, order.looks_apart_s(self.state, self.rank)))
        elif num_idle == 1:
            self.state.refresh(only_missing=True)
        else:
            self.state.refresh(max_age_s=self.idle_s(), longest_age_s=LONGEST_IDLE_S)
        if num_idle and not was_settled and self.is_settled():
            self.state.refresh()

    def sit_out(self, error: OSError) -> None:
        """Wait for a file system that fails: a while, longer each time, and not for ever."""
        now = time.monotonic()
        self.trouble_since = now if self.trouble_since is None else self.trouble_since
        lasted_s = now - self.trouble_since
        if lasted_s > (DENIED_PATIENCE_S if error.errno in DENIED else TROUBLE_PATIENCE_S):
            raise error
        wait_s = min(max(lasted_s, TROUBLE_WAIT_S), 30 * TROUBLE_WAIT_S)
        logger.warning("%s; looking again in %.0f s", describe(error), wait_s)
        time.sleep(wait_s)

    def is_settled(self) -> bool:
        """Whether no shard of this round is left to do, by anybody."""
        return not any(
            index in self.shards and self.state.is_left(stages, index)
            for stages in self.passes
            for index in self.state.missing(stages)
        )

    @property
    def shards(self) -> range:
        """Those of this round."""
        return self.state.fingerprints.shards_of(self.number, len(self.state.shards))

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
        held, num_done = self.state.holders(), 0
        for stages in (self.current_pass, *others) if self.passes else ():
            for index in order.in_order(self.state, stages, self.shards, self.rank):
                shard = self.state.shards[index]
                if shard.index in held or not order.is_takeable(self.state, stages, shard):
                    continue
                if not order.is_own(shard.index, self.rank):  # who may have done it by now
                    self.state.refresh_shard(shard)
                if not order.is_takeable(self.state, stages, shard):
                    num_done += 1
                    if num_done == order.MANY_DONE:  # to look at all is less work
                        self.state.refresh(only_missing=True)
                    continue
                lease = self.lease(shard_lease(shard.index))
                if lease is None:
                    continue
                if lease.taken_from is None:
                    return stages, shard, lease
                with lease, suppress(LeaseLostError):  # or another has noted it by now
                    self.attempts.record_death(stages, shard, lease.taken_from)
        return None

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
        if found[0] != stages or files.exists(self.run_dir.result("rollouts", index)):
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
        memory = worker_memory(device, self.rank, offload=config.offload)
        placement = decide_placement(self.pipeline, config, memory_bytes=memory, device=device)
        logger.info("%s", placement.line())
        if not placement.together:
            self.engines.one_at_a_time = True
            self.passes = tuple((stage,) for stages in self.passes for stage in stages)
            self.current_pass = self.passes[0] if self.passes else ()

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
                is_done = self.attempt(left, shard, lease)
            except LeaseLostError as error:
                logger.warning("%s", error)
                return False
            finally:
                self.state.refresh_shard(shard)
            if is_done:
                self.keep_ranking(shard)
            return is_done

    def keep_ranking(self, shard: Shard) -> None:
        """Rank a shard whose stages are all done, which the merge would otherwise have to do."""
        if not all(self.state.is_complete(stage, shard) for stage in STAGES):
            return
        info = self.state.manifest.shards[shard.index]
        with spent_on("ranking"):
            error = caught(functools.partial(rank_finished, self.run_dir, self.pipeline, info))
        if error is not None:
            logger.debug("shard %d is left to the merge to rank: %s", shard.index, error)

    def attempt(self, left: Sequence[Stage], shard: Shard, lease: Lease) -> bool:
        """Try once; a failure is recorded, and the run goes on."""
        way = self.attempts.way(shard)
        # A shard that may kill this worker is blamed alone: no other is leased beside it.
        ahead = self.look_ahead(self.current_pass) if way.is_first else ()
        work = self.shard_work(left, shard, lease, ahead)
        with self.meter.shard():
            error = caught(functools.partial(work.do, left, way.process))
        if isinstance(error, Exception) and isinstance(
            lost := caught(lease.verify), LeaseLostError
        ):
            error = lost  # whoever holds the shard now says what is wrong with it
        return self.attempts.settle(shard, work.stage, error, way)

    def is_broken(self) -> bool:
        """Whether this worker fails whatever it touches; it then waits for the others.

        Raises:
            StreamEngineError: when there are no others.
        """
        if not self.attempts.are_hopeless:
            return False
        self.release_reserved()
        self.attempts.give_up_when_alone(self.rank.num_workers, is_settled=self.is_settled())
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
        if not self.engines.holds(left):
            self.show("loading models", at_once=True)
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

    # -- small parts -----------------------------------------------------------------------------

    def lease(self, name: str) -> Lease | None:
        return Lease.acquire(
            self.run_dir.leases_dir,
            name,
            worker_id=self.rank.worker_id,
            timeout_s=self.settings.lease_timeout_s,
        )

    def tick(self, stage: Stage, outcomes: int, tokens: int) -> None:
        self.meter.made(outcomes, tokens)
        self.show(DOING[stage], at_once=not outcomes)

    def show(self, doing: str, *, at_once: bool = False) -> None:
        """Say what happens now; `at_once` on a live view, where what follows may take long."""
        if self.view.is_due(at_once=at_once):
            with suppress(OSError):  # what is shown may be old; the work goes on
                self.state.refresh(max_age_s=REFRESH_S)
            self.view.update(self.meter.progress(self.state, doing), at_once=at_once)
