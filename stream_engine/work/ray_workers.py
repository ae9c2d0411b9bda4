"""A run whose workers are Ray actors: `stream-engine run --launcher ray`.

This process is the driver. It reads the input, shows how far the run is, and builds the dataset;
it loads no model. Each actor is one worker as torchrun would start it: a rank that takes shards by
their leases, and meets the others in the work directory alone. So actors may come and go: one that
dies is started again by Ray wherever there is room, one that finds no room holds up nobody, and
nodes that join later get those that were waiting. Ray is imported here alone, inside functions.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from stream_engine import DISTRIBUTION
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, DeviceLostError, RoundOverError, StreamEngineError
from stream_engine.ranks import SHARING_DEVICE, Rank
from stream_engine.run_dir.damage import whole_manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.locations import canonical_source
from stream_engine.text import printable
from stream_engine.work.catching import UNMENDABLE
from stream_engine.work.meter import Meter
from stream_engine.work.progress import ProgressView
from stream_engine.work.runner import (
    ALL_STEPS,
    RunReport,
    Step,
    checked_pipeline,
    run,
    run_steps,
    state_of,
    view_of,
)
from stream_engine.work.worker import PASSES

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often the driver looks at the work directory."""
PARTING_S = 5.0
"""How long workers that have a place may take to see that nothing is left to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayPlaces:
    """How many workers there are to be, and what Ray reserves for each."""

    num_workers: int | None = None
    """None: as many as fit into the cluster as it is now."""
    gpus_per_worker: float | None = None
    """None: one where the cluster has GPUs."""
    cpus_per_worker: float = 1.0
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Custom resources by name."""
    spread: bool = False
    """Over the nodes, instead of filling one after the other."""
    max_restarts: int = 8
    """Of each worker; -1 is without end."""

    def within(self, cluster: dict[str, float]) -> RayPlaces:
        """With numbers in place of None, for a cluster of these resources."""
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if cluster.get("GPU") else 0.0
        needs = {"GPU": gpus, "CPU": self.cpus_per_worker, **self.resources}
        room = [int(cluster.get(name, 0.0) // each) for name, each in needs.items() if each]
        number = self.num_workers or max(1, min(room, default=1))
        return dataclasses.replace(self, num_workers=number, gpus_per_worker=gpus)


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How one worker ended."""

    samples_added: int = 0
    shards_done: int = 0
    error: str | None = None
    is_final: bool = False
    """Whether the error is one of settings or models, which ends the run for all workers."""
    is_round_over: bool = False
    """Whether it is that others went on to the next round."""


def run_on_ray(
    config: RunConfig,
    places: RayPlaces,
    *,
    steps: Sequence[Step] = ALL_STEPS,
    show_progress: bool = True,
    number: int | None = None,
) -> RunReport:
    """`run`, with the models on the workers of a Ray cluster: RAY_ADDRESS, one that runs here
    already, or else a new one of this machine alone.

    Raises:
        RoundOverError: when the run has gone on from the round `number`.
        ConfigError: as `run`, and when Ray is not installed or cannot run these settings.
        StreamEngineError: when every worker ended before the work was done.
    """
    if "work" not in steps or config.run_stage == 2:
        return run(config, steps=steps, show_progress=show_progress, number=number)
    refuse_unfit(config)
    pipeline = checked_pipeline(config)
    with view_of(config, show_progress=show_progress) as view:
        # What is wrong is said here, before anything starts.
        run_steps(config, pipeline, (), view, number)
        known = whole_manifest(RunDir(config.work_dir)).inputs
        is_new = any(canonical_source(path) not in known for path in config.dataset_path)
        crew = Crew(config, places, steps, number)
        try:
            if is_new:
                crew.start()
            read = run_steps(config, pipeline, [s for s in steps if s == "shard"], view, number)
            if is_new or not is_settled(config):
                crew.start()
                crew.wait(view)
        finally:
            crew.end()
        report = run_steps(config, pipeline, [s for s in steps if s == "merge"], view, number)
    return msgspec.structs.replace(
        report,
        samples_added_here=read.samples_added_here + crew.samples_added,
        shards_done_here=crew.shards_done,
    )


def refuse_unfit(config: RunConfig) -> None:
    """Raise ConfigError for what this launcher cannot do."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--launcher ray needs Ray: pip install '{DISTRIBUTION}[ray]'") from error
    if Rank.from_environment().world_size > 1:
        raise ConfigError(
            "--launcher ray starts the workers itself: run it once, without torchrun, deepspeed or "
            "srun around it"
        )
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"--launcher ray gives each worker one process, tensor_parallel is "
            f"{config.tensor_parallel}: start that run with torchrun on each node"
        )


def is_settled(config: RunConfig) -> bool:
    """Whether the models have nothing left to do."""
    state = state_of(config)
    return not any(state.unsettled(stages) for stages in PASSES[config.run_stage])


class Crew:
    """The workers of a run, as the driver has them: started, waited for, ended."""

    def __init__(
        self, config: RunConfig, places: RayPlaces, steps: Sequence[Step], round_number: int | None
    ) -> None:
        self.config = config
        self.round_number = round_number
        self.places = places
        self.steps = [step for step in steps if step != "merge"]
        self.actors: list[Any] = []
        self.placed: list[Any] = []
        self.waiting: dict[Any, int] = {}
        """The answer that each worker owes, and the worker's number."""
        self.samples_added = self.shards_done = 0

    def start(self) -> None:
        """Ask Ray for the workers, once; it places each when there is room."""
        if self.actors:
            return
        import ray

        if not ray.is_initialized():
            ray.init(logging_level=logging.WARNING)
        places = self.places.within(ray.cluster_resources())
        num_workers, gpus = places.num_workers, places.gpus_per_worker
        assert num_workers is not None and gpus is not None
        kind = ray.remote(RayWorker)
        settings, folder = self.config.to_dict(), os.getcwd()
        job = (settings, self.steps, self.round_number, folder, num_workers, gpus)
        for number in range(1, num_workers + 1):
            actor = kind.options(
                name=f"stream-engine-worker-{number}",
                num_cpus=places.cpus_per_worker,
                num_gpus=gpus,
                resources=places.resources,
                scheduling_strategy="SPREAD" if places.spread else "DEFAULT",
                max_restarts=places.max_restarts,
                max_task_retries=-1,
            ).remote(number)
            self.actors.append(actor)
            self.placed.append(actor.__ray_ready__.remote())
            self.waiting[actor.work.remote(*job)] = number
        logger.info(
            "asked Ray for %d workers, %g GPUs and %g CPUs each",
            num_workers,
            gpus,
            places.cpus_per_worker,
        )

    def wait(self, view: ProgressView) -> None:
        """Until a worker says that nothing is left to do, by whomever.

        Raises:
            StreamEngineError: when one finds settings or models wrong, or all have ended before.
        """
        import ray

        state = state_of(self.config)
        meter = Meter([stage for stages in PASSES[self.config.run_stage] for stage in stages])
        meter.is_running = True
        last = "none of them could be started"
        with view:
            while self.waiting:
                ended, _ = ray.wait(list(self.waiting), timeout=LOOK_S)
                for answer in ended:
                    error = self.take(answer)
                    if error is None:
                        self.part()
                        return
                    last = error
                if view.is_due():
                    state.refresh()
                    view.update(meter.progress(state, self.doing()))
        raise StreamEngineError(
            f"all {len(self.actors)} workers ended before the work was done; the last one: {last}. "
            "The same command resumes"
        )

    def take(self, answer: Any) -> str | None:
        """Count what a worker did; the error with which it ended, or None.

        Raises:
            RoundOverError: when others of this run went on to the next round.
            StreamEngineError: when that is one of settings or models.
        """
        import ray

        number = self.waiting.pop(answer)
        try:
            ended = msgspec.convert(ray.get(answer), Ended)
        except ray.exceptions.RayError as error:
            (said, *_) = str(error).splitlines() or [type(error).__name__]
            ended = Ended(error=f"Ray gave it up: {said}")
        self.samples_added += ended.samples_added
        self.shards_done += ended.shards_done
        if ended.is_round_over:
            raise RoundOverError(ended.error)
        if ended.is_final:
            raise StreamEngineError(ended.error)
        if ended.error is not None:
            logger.warning("worker %d ended: %s", number, printable(ended.error))
        return ended.error

    def doing(self) -> str:
        """How many workers have had a place so far, where some have not."""
        num_placed = len(self.numbers_placed())
        if num_placed == len(self.placed):
            return "working"
        return f"working, {num_placed} of {len(self.placed)} workers placed"

    def numbers_placed(self) -> set[int]:
        """The workers that have had a place so far."""
        import ray

        placed, _ = ray.wait(self.placed, num_returns=len(self.placed), timeout=0)
        return {self.placed.index(ready) + 1 for ready in placed}

    def part(self) -> None:
        """Let the others see for themselves that all is done; those without a place are not
        waited for."""
        import ray

        numbers = self.numbers_placed()
        rest = [answer for answer, number in self.waiting.items() if number in numbers]
        ended, _ = ray.wait(rest, num_returns=len(rest), timeout=PARTING_S) if rest else ([], [])
        for answer in ended:
            self.take(answer)

    def end(self) -> None:
        """Give all places back."""
        if self.actors:
            import ray

            for actor in self.actors:
                ray.kill(actor)


class RayWorker:
    """One worker, a process of its own. Ray starts it again when it dies, and asks again."""

    def __init__(self, number: int) -> None:
        """`number` counts from 1: the driver is rank 0, and shows what there is to show."""
        self.number = number

    def __repr__(self) -> str:
        return f"worker {self.number}"  # what stands before its lines in the driver's output

    def work(
        self,
        settings: dict[str, Any],
        steps: Sequence[Step],
        round_number: int | None,
        folder: str,
        num_workers: int,
        gpus_per_worker: float,
    ) -> dict[str, Any]:
        """Work until nothing is left to do, and say how it ended.

        What only a new process can mend, and what nobody foresaw, ends this one.
        """
        os.environ.update(self.environment(num_workers, gpus_per_worker))
        try:
            config = RunConfig.create(settings)
            self.enter(folder, config)
            report = run(config, steps=steps, show_progress=False, number=round_number)
        except (DeviceLostError, OSError) as error:
            self.leave(1, error)
        except StreamEngineError as error:
            return msgspec.to_builtins(
                Ended(
                    error=str(error),
                    is_final=isinstance(error, UNMENDABLE),
                    is_round_over=isinstance(error, RoundOverError),
                )
            )
        except SystemExit as error:  # SIGTERM; the leases are given back
            self.leave(error.code if isinstance(error.code, int) else 1, None)
        except Exception as error:  # noqa: BLE001  Ray would take it for an answer
            self.leave(1, error)
        return msgspec.to_builtins(
            Ended(
                samples_added=report.samples_added_here,
                shards_done=report.shards_done_here,
            )
        )

    def environment(self, num_workers: int, gpus_per_worker: float) -> dict[str, str]:
        """A launcher's variables. The worker's GPUs are the only ones that it sees."""
        sharing = {SHARING_DEVICE: str(math.ceil(1 / gpus_per_worker))} if gpus_per_worker else {}
        return sharing | {
            "RANK": str(self.number),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(num_workers + 1),
            "LOCAL_WORLD_SIZE": str(min(num_workers, os.cpu_count() or 1)),
        }

    def enter(self, folder: str, config: RunConfig) -> None:
        """Stand where the driver stands, so that the same paths mean the same.

        Raises:
            ConfigError: when the run is not to be found from here.
        """
        if os.path.isdir(folder):
            os.chdir(folder)
        if not files.exists(RunDir(config.work_dir).run_json):
            raise ConfigError(
                f"{config.work_dir} on {socket.gethostname()} is not the driver's: give the full "
                "path of a folder that every node sees, or object storage (s3://...)"
            )

    def leave(self, status: int, error: BaseException | None) -> NoReturn:
        """End this process, so that Ray starts another in its place."""
        if error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
