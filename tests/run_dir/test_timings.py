"""What a run tells of its time: seconds of its stages, and CPU beside the models."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from stream_engine import timing
from stream_engine.cli.main import main
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.timings import timing_of
from stream_engine.work.runner import run
from tests.conftest import write_questions
from tests.echo_pipeline import echo_config
from tests.synthetic import FINGERPRINTS


def test_cpu_is_counted_for_the_thread_that_spent_it_and_once() -> None:
    timing.take()

    def compute() -> None:
        with timing.spent_on("reading"):
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                pass

    with timing.spent_on("leases"):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    spent = timing.take()
    assert spent["reading"] >= 0.05 > spent["leases"]
    assert timing.take() == {}


def test_status_tells_where_the_time_went(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_questions(tmp_path / "q.jsonl", [f"what is number {i} for" for i in range(10)])
    run(echo_config(tmp_path / "run", dataset), show_progress=False)
    assert main(["status", str(tmp_path / "run"), "--timing", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["timing"]
    assert told["questions"] == 10
    assert {"leases", "looking", "reading", "writing"} <= told["cpu_ms"].keys()
    assert all(ms > 0 for ms in told["cpu_ms"].values())
    assert main(["status", str(tmp_path / "run"), "--timing"]) == 0
    shown = capsys.readouterr().out
    assert f"{sum(told['cpu_ms'].values()):.2f} ms of CPU beside the models" in shown
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    assert "timing" not in json.loads(capsys.readouterr().out)


def test_a_run_without_results_has_no_times(tmp_path: Path) -> None:
    state = RunState(RunDir(tmp_path), FINGERPRINTS, max_shard_retries=2).refresh()
    assert timing_of(state).lines() == ["timing:  no question has a result"]
