"""Workers whose clocks disagree by hours: times are the store's, whoever asks."""

from __future__ import annotations

import os
import time
from pathlib import Path

from stream_engine.config import RunConfig
from stream_engine.run_dir.failures import record_failure
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import collect
from tests.conftest import write_questions
from tests.echo_pipeline import echo_config
from tests.processes import context

HOUR_S = 3600.0


def work_in_another_hour(settings: dict[str, object], rank: int, ahead_s: float) -> None:
    from stream_engine import pipelines
    from stream_engine.work.runner import run

    pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
    real = time.time
    time.time = lambda: real() + ahead_s
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os._exit(run(RunConfig.create(settings), show_progress=False).exit_status)


def test_two_workers_two_hours_apart_wait_for_no_more_than_the_back_off(tmp_path: Path) -> None:
    """The one whose clock was behind waited an hour for a shard that the other had failed at."""
    questions = [f"flaky {i} is what" if i % 4 == 0 else f"what is {i} for" for i in range(12)]
    dataset = write_questions(tmp_path / "q.jsonl", questions)
    config = echo_config(tmp_path / "run", dataset, retry_backoff_s=0.5)
    workers = [
        context.Process(target=work_in_another_hour, args=(config.to_dict(), rank, ahead_s))
        for rank, ahead_s in enumerate((HOUR_S, -HOUR_S))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    run_file = read_run_file(RunDir(tmp_path / "run"))
    state = RunState(RunDir(tmp_path / "run"), run_file.fingerprints, max_shard_retries=2)
    status = collect(state.refresh())
    assert (status.samples.done, status.shards.failed) == (12, 0)


def test_status_says_what_a_run_waits_for_by_the_stores_clock(
    tmp_path: Path, monkeypatch, echo: None
) -> None:
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this for", "what is that for"])
    config = echo_config(tmp_path / "run", dataset, samples_per_shard=1, retry_backoff_s=60.0)
    from stream_engine.work.runner import run

    run(config, steps=("shard",), show_progress=False)
    run_dir = RunDir(tmp_path / "run")
    fingerprints = read_run_file(run_dir).fingerprints
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + HOUR_S)
    record_failure(
        run_dir,
        RuntimeError("out of luck"),
        shard=1,
        stage="rollouts",
        fingerprint=fingerprints["rollouts"],
        worker="w",
        config=config,
    )
    monkeypatch.setattr(time, "time", lambda: real() - HOUR_S)
    state = RunState(run_dir, fingerprints, max_shard_retries=2).refresh()
    (waiting,) = collect(state).waiting
    assert waiting.shard == 1 and "out of luck" in waiting.error
    assert 0 < waiting.retry_in_s <= 60
