"""Runs the steps: a process group and a time limit each, and a summary that a cut-off run leaves.

OUT/summary.json is replaced whenever a step begins, ends, or has found something new.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMITS_S = {
    "machine": 30,
    "suites": 150,
    "demo": 70,
    "models": 180,
    "kernels": 70,
    "trace": 40,
}
"""The steps in order of worth, and their seconds of nine minutes. Time that one leaves goes to the
next, so that a limit says when a step has to be done, counted from the start."""
LOG_BYTES = 4 << 20
SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Summary:
    """What is known so far, and the file that says it."""

    def __init__(self, path: Path, limits_s: Mapping[str, float], *, rehearse: bool) -> None:
        self.path = path
        self.values: dict[str, Any] = {
            "status": "running",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "minutes": round(sum(limits_s.values()) / 60, 2),
            "rehearsal": rehearse,
            "seconds": 0.0,
            "steps": {name: {"status": "waiting", "results": {}} for name in limits_s},
        }
        self.begun = time.monotonic()

    def update(self, step: str, **values: Any) -> None:
        self.values["steps"][step].update(values)
        self.write()

    def write(self) -> None:
        self.values["seconds"] = round(time.monotonic() - self.begun, 1)
        write_json(self.path, self.values)

    def close(self, status: str) -> None:
        self.values["status"] = status
        self.write()


def run_steps(out: Path, limits_s: Mapping[str, float], *, rehearse: bool) -> int:
    """Run steps, each with its seconds and those that others left; 0 when all passed, else 1."""
    out.mkdir(parents=True, exist_ok=True)
    # What a step leaves behind when it dies becomes this process's child, and can be found.
    ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    summary = Summary(out / "summary.json", limits_s, rehearse=rehearse)
    summary.write()
    due = summary.begun
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        try:
            for name, limit_s in limits_s.items():
                due += limit_s
                run_step(name, summary, out=out, scratch=Path(scratch), due=due)
        except BaseException:
            summary.close("cut off")
            raise
        finally:
            kill_descendants()
    statuses = {step["status"] for step in summary.values["steps"].values()}
    summary.close("passed" if statuses == {"passed"} else "failed")
    print(f"{summary.values['status']}: {summary.path}", flush=True)
    return 0 if statuses == {"passed"} else 1


def run_step(name: str, summary: Summary, *, out: Path, scratch: Path, due: float) -> None:
    """Run one step until it ends or `due` (of time.monotonic) has come, then end all it started."""
    begun = time.monotonic()
    limit_s = due - begun
    rehearse = summary.values["rehearsal"]
    log_path, results_path = out / f"{name}.log", scratch / f"{name}.json"
    summary.update(name, status="running", limit_s=round(limit_s, 1), log=log_path.name)
    command = [sys.executable, "-m", "tests.gpu.step", name, str(out), str(scratch)]
    with log_path.open("ab") as log:
        log.truncate(0)
        process = subprocess.Popen(
            [*command, f"--limit_s={limit_s}", *(["--rehearse"] if rehearse else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(rehearse=rehearse),
            start_new_session=True,
        )
    seen = 0.0
    while process.poll() is None and time.monotonic() < due:
        time.sleep(0.1)
        keep_tail(log_path)
        changed = results_path.stat().st_mtime if results_path.exists() else 0.0
        if changed != seen:
            seen = changed
            summary.update(name, results=json.loads(results_path.read_text()))
    is_late = process.poll() is None
    left = kill_descendants()
    rc = process.wait(timeout=60)
    keep_tail(log_path)
    if results_path.exists():
        summary.update(name, results=json.loads(results_path.read_text()))
    status = "cut at its limit" if is_late else "passed" if rc == 0 else "failed"
    seconds = round(time.monotonic() - begun, 1)
    more = {} if status == "passed" else {"end_of_log": tail(log_path, 1500)}
    summary.update(name, status=status, rc=rc, seconds=seconds, processes_killed=left, **more)
    print(f"{name}: {status} ({seconds:.0f} s)", flush=True)


def environment(*, rehearse: bool) -> dict[str, str]:
    """The variables of a step's process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(ROOT), str(ROOT / "kernels"), kept.get("PYTHONPATH", "")]
    kept |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if rehearse:
        kept |= {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "STREAM_KERNELS_FORM": "triton",
            "TRITON_INTERPRET": "1",
        }
    return kept


def kill_descendants(patience_s: float = 20.0) -> int:
    """End whatever this process's children started and are; returns how many there were."""
    begun, killed = time.monotonic(), set()
    while (alive := descendants()) and time.monotonic() - begun < patience_s:
        for pid in alive:
            killed.add(pid)
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return len(killed)


def descendants() -> list[int]:
    """Processes below this one that have not ended; orphans of a dead step among them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def keep_tail(path: Path) -> None:
    """Cut a log that has grown over LOG_BYTES to its second half; its writer appends."""
    if path.stat().st_size > LOG_BYTES:
        with path.open("rb+") as log:
            log.seek(-LOG_BYTES // 2, os.SEEK_END)
            kept = log.read()
            log.seek(0)
            log.truncate(0)
            log.write(b"(the beginning was cut)\n" + kept)


def tail(path: Path, num_bytes: int) -> str:
    return path.read_bytes()[-num_bytes:].decode(errors="replace")


def write_json(path: Path, values: Any) -> None:
    """Replace a file by these values, or leave it as it was."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
