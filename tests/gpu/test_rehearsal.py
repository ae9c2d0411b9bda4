"""The kit's command on this machine: every step runs, and one that hangs stops nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.runner import LIMITS_S, ROOT
from tests.gpu.step import HANG_VARIABLE


def rehearse(out: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit status of a rehearsal, and its summary."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", str(out), "--rehearse", *words],
        cwd=ROOT,
        env=os.environ | environment,
        timeout=1500,
    )
    return done.returncode, json.loads((out / "summary.json").read_text())


def running(word: str) -> list[str]:
    """The command lines of processes that were given `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if word.encode() in words:
            found.append(b" ".join(words).decode())
    return found


@pytest.mark.timeout(1800)
def test_every_step_runs_in_a_rehearsal(tmp_path):
    status, summary = rehearse(tmp_path / "out")
    assert status == 0, json.dumps(summary, indent=1)
    assert summary["status"] == "passed"
    assert list(summary["steps"]) == list(LIMITS_S)
    for name, step in summary["steps"].items():
        assert (name, step["status"], step["rc"]) == (name, "passed", 0)
        assert not {"failures", "not_run"} & step["results"].keys(), step["results"]
    files = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert len(files) <= 8 and {f"{name}.log" for name in LIMITS_S} < set(files)


def test_a_run_that_is_cut_off_leaves_a_summary_and_no_process(tmp_path):
    seconds = f"{3700 + os.getpid() / 1e7:.7f}"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu", str(tmp_path), "--rehearse", "--only", "machine"],
        cwd=ROOT,
        env=os.environ | {HANG_VARIABLE: f"machine {seconds}"},
    )
    while process.poll() is None and not running(seconds):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "cut off"
    assert summary["steps"]["machine"]["status"] == "running"
    assert running(seconds) == []


def test_a_step_that_hangs_is_cut_at_its_limit_and_the_rest_runs(tmp_path):
    """A process that has left its session and its group, and its parent, ends with it."""
    seconds = f"{3600 + os.getpid() / 1e7:.7f}"  # by which the sleeping process is known
    words = ("--only", "kernels", "machine", "--limit", "kernels=45")
    hangs = {HANG_VARIABLE: f"kernels {seconds}"}
    status, summary = rehearse(tmp_path / "out", *words, **hangs)
    cut, after = summary["steps"]["kernels"], summary["steps"]["machine"]
    assert status == 1 and summary["status"] == "failed"
    assert cut["status"] == "cut at its limit" and cut["rc"] != 0
    assert cut["processes_killed"] >= 2
    assert cut["limit_s"] == 45 and cut["seconds"] > 44
    assert "step.py" in (tmp_path / "out/kernels.log").read_text(), "where it hung is not told"
    assert after["status"] == "passed" and after["results"]["versions"]
    assert running(seconds) == []
