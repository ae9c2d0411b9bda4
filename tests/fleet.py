"""Workers that join a run and leave it, each a launcher's process tree: python, torchrun, Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
RAY = ["--launcher", "ray", "--num_workers", "1"]
ACTOR = "ray::"
"""How the names of Ray's worker processes begin."""


@dataclass
class Member:
    """One launcher and what it started."""

    kind: str
    process: subprocess.Popen[bytes]

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def pids(self) -> set[int]:
        """Of its processes; an actor is not among them, since Ray starts it."""
        return {process.pid for process in tree(self.process.pid)}

    def leave(self, number: signal.Signals) -> None:
        """SIGTERM to the launcher, as of a preemption; SIGKILL to all at once, as of a lost node.

        What is killed of Ray is the actor, which Ray starts again.
        """
        if number == signal.SIGTERM:
            self.process.terminate()
        else:
            for process in actors() if self.kind == "ray" else tree(self.process.pid):
                with suppress(psutil.Error):
                    process.kill()


def join(
    kind: str, words: Sequence[object], *, log: Path, environment: Mapping[str, str]
) -> Member:
    """Start one worker of `stream-engine words`; its output is appended to `log`."""
    line = ["-m", "stream_engine", *map(str, words)]
    commands = {"python": line, "torchrun": [*TORCHRUN, *line], "ray": [*line, *RAY]}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *commands[kind]],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=output,
        )
    return Member(kind, process)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def actors() -> list[psutil.Process]:
    """The workers of the Ray cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"{ACTOR}RayWorker"):
                found.append(process)
    return found
