"""One step's process, as the runner starts it: `python -m tests.gpu.step NAME OUT SCRATCH ...`.

A step is a module of this folder with `run(kit)`; the kit says where and how large it runs, and
keeps what it finds.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.gpu.runner import write_json

HANG_VARIABLE = "STREAM_GPU_CHECK_HANG"
"""For tests, "NAME SECONDS": that step hangs, and so does a `sleep` in a session of its own."""
SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Kit:
    """What a step is told, and where it leaves what it finds."""

    name: str
    out: Path
    scratch: Path
    due: float  # of time.monotonic
    rehearse: bool
    results: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def seconds_left(self) -> float:
        return self.due - time.monotonic()

    def keep(self, **values: Any) -> None:
        """Add to the step's results, which a step that is cut off has left."""
        self.results.update(values)
        write_json(self.scratch / f"{self.name}.json", self.results)

    def part(self, name: str, work: Callable[[], Any], *, needs_s: float = 0.0) -> None:
        """Keep what `work` returns; a part that fails, or has no time, leaves the others alone."""
        if not self.rehearse and self.seconds_left < needs_s:
            why = f"it needs {needs_s:.0f} s, {self.seconds_left:.0f} were left"
            self.keep(not_run=self.results.get("not_run", {}) | {name: why})
            return
        begun = time.monotonic()
        try:
            self.keep(**{name: work()})
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}"[:2000]
            self.keep(failures=self.results.get("failures", {}) | {name: told})
        spent = round(time.monotonic() - begun, 1)
        self.keep(seconds=self.results.get("seconds", {}) | {name: spent})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def kept_by(self, step: str) -> dict[str, Any]:
        """What another step has found so far."""
        path = self.scratch / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.step", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--limit_s", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # not to outlive the runner
    # The log is told where every thread is, twice: where starting is slow, the second may be late.
    faulthandler.dump_traceback_later(0.4 * arguments.limit_s, repeat=True)
    hanging, _, seconds = os.environ.get(HANG_VARIABLE, "").partition(" ")
    if hanging == arguments.name:
        subprocess.Popen(["sleep", seconds], start_new_session=True)
        time.sleep(float(seconds))
    kit = Kit(
        arguments.name,
        arguments.out,
        arguments.scratch,
        due=time.monotonic() + arguments.limit_s,
        rehearse=arguments.rehearse,
    )
    importlib.import_module(f"tests.gpu.{arguments.name}").run(kit)
    return 1 if kit.failed else 0


if __name__ == "__main__":
    sys.exit(main())
