"""A pytest plugin that keeps count in a file after every test, for runs that are cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.runner import write_json

VARIABLE = "STREAM_GPU_CHECK_TALLY"
LISTED = 30
TALLY: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}, "errors": {}}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test once, in the process that all reports come to."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    text = str(report.longrepr)[-700:]
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else text
        TALLY["skipped"][reason] = TALLY["skipped"].get(reason, 0) + 1
    elif report.failed:
        TALLY["failed" if report.when == "call" else "errors"][report.nodeid] = text
    elif report.when == "call":
        TALLY["passed"] += 1
    listed = {
        kind: dict(list(values.items())[:LISTED])
        for kind, values in TALLY.items()
        if isinstance(values, dict)
    }
    counts = {f"num_{kind}": len(TALLY[kind]) for kind in ("failed", "errors")}
    write_json(Path(os.environ[VARIABLE]), TALLY | listed | counts)
