"""Ranks as processes that start at once: forked from a server that has torch imported already.

Each runs the real command line with a launcher's environment, and can be killed like any process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = [
    "torch",
    "transformers",
    "webdataset",
    "stream_engine.cli.working",
    "stream_engine.engine",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*PRELOADED, "tests.processes"])


def start_rank(
    argv: Sequence[object], *, rank: int = 0, world_size: int = 1, log: Path, **more: str
) -> ForkServerProcess:
    """Start `stream-engine argv` as one rank; its output is appended to `log`.

    `more` are further variables of its environment.
    """
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    process = context.Process(target=_rank, args=([*map(str, argv)], environment, str(log)))
    process.start()
    return process


def run_rank(argv: Sequence[object], *, log: Path) -> int | None:
    """Run `stream-engine argv` to its end as the only rank; returns its exit status."""
    process = start_rank(argv, log=log)
    process.join(timeout=300)
    return process.exitcode


def _rank(argv: list[str], environment: dict[str, str], log: str) -> None:
    import torch

    from stream_engine import pipelines
    from stream_engine.cli.main import main

    pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    status = main(argv)
    sys.stdout.flush()
    os._exit(status)
