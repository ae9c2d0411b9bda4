"""A step in processes of its own: its wall clock, CPU seconds and the peak memory of all of them.

Memory is what all processes of the step hold together, sampled every 20 ms: a page that several
share counts once (`pss`); `rss` counts it in each.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from stream_engine.run_dir.versions import versions_of

Figures = dict[str, Any]
Keep = Callable[[Figures], None]

ROOT = Path(__file__).resolve().parents[3]
SAMPLE_S = 0.02
PACKAGES = ("msgspec", "pyarrow", "numpy", "webdataset", "pillow")


def machine() -> Figures:
    """The processor, how many of its cores may be used, and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's, the commit's, and those of packages that a step leans on."""
    return {"python": platform.python_version(), "commit": commit()} | versions_of(packages)


def commit() -> str:
    """The commit of this checkout, marked when files differ from it."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def load() -> float:
    """Processes that ran or waited to, on the average of the last minute."""
    return round(os.getloadavg()[0], 2)


def measured(command: Sequence[str]) -> Figures:
    """Run a command, which prints one JSON object last; returns that and what the command took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, load_before = time.monotonic(), load()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peaks = {"pss": 0, "rss": 0, "processes": 0}
    watch = threading.Thread(target=sample, args=(process.pid, peaks), daemon=True)
    watch.start()
    printed = process.communicate()[0]
    watch.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        **json.loads(printed.strip().splitlines()[-1]),
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1),
        "peak_mib_of_all": round(peaks["pss"] / 2**20),
        "peak_mib_of_all_shared_counted_twice": round(peaks["rss"] / 2**20),
        "processes": peaks["processes"],
        "load": [load_before, load()],
    }


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of this checkout."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def sample(pid: int, peaks: dict[str, int]) -> None:
    """Note the most that a process and all that it started hold, until it ends."""
    try:
        parent = psutil.Process(pid)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            held = [memory_of(one.pid) for one in (parent, *parent.children(recursive=True))]
            peaks["rss"] = max(peaks["rss"], sum(rss for rss, _ in held))
            peaks["pss"] = max(peaks["pss"], sum(pss for _, pss in held))
            peaks["processes"] = max(peaks["processes"], sum(rss > 0 for rss, _ in held))
            time.sleep(SAMPLE_S)
    except psutil.NoSuchProcess:
        return


def memory_of(pid: int) -> tuple[int, int]:
    """Resident bytes of a process: all, and with its share alone of what others hold too."""
    found = {"Rss": 0, "Pss": 0}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except OSError:
        pass  # it has ended
    return found["Rss"], found["Pss"]
