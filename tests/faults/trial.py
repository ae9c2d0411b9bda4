"""One command of the command line in a process of its own, with harm done to it on its way.

Processes are forked from a server that has the slow imports done, so that one costs some tens of
milliseconds. The pipeline is `echo`, which loads no model.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from tests.faults.hook import Change, Deed, Hook
from tests.processes import PRELOADED, context

TIMEOUT_S = 60.0
POLL_S = 0.004

context.set_forkserver_preload([*PRELOADED, "pyarrow.parquet", "tests.faults.warm"])


class Harm(NamedTuple):
    """What is done to a command, at its how manieth change of a file."""

    deed: Deed = "none"
    at: int = 0


class Ended(NamedTuple):
    """How a command ended; `status` is None when it did not within the time."""

    words: tuple[str, ...]
    status: int | None
    output: str
    met: str
    """The change at which harm was done; empty when it was not reached."""

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output


class Running:
    """A command that was started."""

    def __init__(self, work_dir: Path, words: Sequence[object], folder: Path, harm: Harm) -> None:
        """`folder` lies outside of the work directory; what the command prints is kept there."""
        self.words = tuple(map(str, words))
        number = sum(1 for _ in folder.glob("log-*"))
        self.log, self.told = folder / f"log-{number}", folder / f"told-{number}"
        self.recorded = folder / f"changes-{number}"
        self.log.touch()
        self.told.touch()
        arguments = (self.words, str(work_dir), harm, str(self.log), str(self.told))
        self.process: ForkServerProcess = context.Process(
            target=run_command, args=(*arguments, str(self.recorded))
        )
        self.process.start()

    def wait(self) -> Ended:
        """Wait for its end; kill it when that does not come."""
        self.process.join(TIMEOUT_S)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            self.process.join()
        output = self.log.read_text(errors="replace")
        self.process.close()
        return Ended(self.words, status, output, self.told.read_text().strip())

    def wait_until_stopped(self) -> bool:
        """Wait until it is stopped; False when it ended before."""
        end = time.monotonic() + TIMEOUT_S
        stat = Path(f"/proc/{self.process.pid}/stat")
        while self.process.is_alive() and time.monotonic() < end:
            try:
                if stat.read_text().rpartition(")")[2].split()[0] == "T":
                    return True
            except OSError:
                return False
            time.sleep(POLL_S)
        return False

    def changes(self) -> list[Change]:
        """The changes that it made, where they were recorded."""
        return pickle.loads(self.recorded.read_bytes())  # noqa: S301  written by run_command


def start(
    work_dir: Path, words: Sequence[object], folder: Path, harm: Harm | None = None
) -> Running:
    """Start `stream-engine <words>`."""
    return Running(work_dir, words, folder, harm or Harm())


def run(work_dir: Path, words: Sequence[object], folder: Path, harm: Harm | None = None) -> Ended:
    """Run `stream-engine <words>` to its end."""
    return start(work_dir, words, folder, harm).wait()


def run_command(
    words: Sequence[str], work_dir: str, harm: Harm, log: str, told: str, recorded: str
) -> None:
    """The process: what it prints goes to `log`; recorded changes to a file of that name."""
    import torch

    from stream_engine import pipelines
    from stream_engine.cli.main import main

    gc.freeze()  # what is shared with the server stays so
    torch.set_num_threads(1)
    pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    hook = Hook(Path(work_dir), at=harm.at, deed=harm.deed, told=Path(told))
    if harm.deed != "none":
        hook.install()
    try:
        status = main(list(words))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    if harm.deed == "record":
        with open(recorded, "wb") as file:
            pickle.dump(hook.changes, file)
    os._exit(status)
