"""Who starts the workers: the launcher around this process, or Ray (`--launcher ray`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stream_engine.cli.flags import convert_flag
from stream_engine.cli.settings import run_arguments
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError

if TYPE_CHECKING:
    from stream_engine.work.ray_workers import RayPlaces
    from stream_engine.work.runner import RunReport, Step

RAY_FLAGS = (
    "num_workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "worker_resources",
    "worker_placement",
    "max_restarts",
)


def launched_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that begins a run and may start its workers."""
    run_arguments(parser)
    add_launcher(parser)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """The flags of `--launcher`."""
    group = parser.add_argument_group("the launcher")
    group.add_argument(
        "--launcher",
        choices=["ray"],
        help="ray: this process reads and merges, and Ray starts the workers; by default it is a "
        "worker itself, alone or one of those that torchrun, deepspeed or srun started",
    )
    of_ray = "with --launcher ray: "
    group.add_argument(
        "--num_workers",
        metavar="N",
        help=f"{of_ray}how many, also more than fit at first (default: as many as fit)",
    )
    group.add_argument(
        "--gpus_per_worker", metavar="X", help=f"{of_ray}default 1 where the cluster has GPUs"
    )
    group.add_argument("--cpus_per_worker", metavar="X", help=f"{of_ray}default 1")
    group.add_argument(
        "--worker_resources", metavar="NAME=X,...", help=f"{of_ray}custom resources of each worker"
    )
    group.add_argument(
        "--worker_placement",
        choices=["pack", "spread"],
        help=f"{of_ray}fill one node after the other (default), or spread over all",
    )
    group.add_argument(
        "--max_restarts",
        metavar="N",
        help=f"{of_ray}how often a worker that dies is started again (default 8; -1: always)",
    )


def run_by_launcher(
    args: argparse.Namespace, config: RunConfig, steps: Sequence[Step], number: int | None = None
) -> RunReport:
    """`run`, by whoever is to start the workers."""
    from stream_engine.work.ray_workers import run_on_ray
    from stream_engine.work.runner import run

    if getattr(args, "launcher", None) is None:
        for name in RAY_FLAGS:
            if getattr(args, name, None) is not None:
                raise ConfigError(f"--{name} goes with --launcher ray")
        return run(config, steps=steps, number=number)
    return run_on_ray(config, places_of(args), steps=steps, number=number)


def places_of(args: argparse.Namespace) -> RayPlaces:
    """What the flags ask Ray for.

    Raises:
        ConfigError: for a value that cannot be.
    """

    from stream_engine.work.ray_workers import RayPlaces

    def number(name: str, kind: type, default: float | None, least: float) -> float | None:
        text = getattr(args, name)
        value = default if text is None else convert_flag(name, text, kind)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least:g}, it is {value:g}")
        return value

    count, gpus = number("num_workers", int, None, 1), number("gpus_per_worker", float, None, 0)
    cpus, restarts = number("cpus_per_worker", float, 1, 0), number("max_restarts", int, 8, -1)
    assert cpus is not None and restarts is not None
    return RayPlaces(
        num_workers=None if count is None else int(count),
        gpus_per_worker=gpus,
        cpus_per_worker=cpus,
        resources=resources_of(args.worker_resources or ""),
        spread=args.worker_placement == "spread",
        max_restarts=int(restarts),
    )


def resources_of(text: str) -> dict[str, float]:
    """`spot=1,disk=0.5` as numbers by name.

    Raises:
        ConfigError: for a part that is not of that form.
    """
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(name.strip() and value.strip() for name, _, value in parts):
        raise ConfigError(f"--worker_resources {text!r}: write name=amount, as in spot=1")
    return {
        name.strip(): convert_flag("worker_resources", value.strip(), float)
        for name, _, value in parts
    }
