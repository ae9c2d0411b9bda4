"""A worker dies at a shard: the others go on, a deadly record is found, no good shard fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from stream_engine import pipelines
from stream_engine.config import RunConfig, WorkerConfig
from stream_engine.errors import DeviceLostError, WorkerDiedError
from stream_engine.records import SampleRollouts
from stream_engine.run_dir.failures import MAX_DEATHS_ALONE, MAX_DEATHS_TOGETHER, record_failure
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import quarantined_by, read_header
from stream_engine.run_dir.state import shard_lease
from stream_engine.store import files
from stream_engine.store.leases import list_leases, this_process
from stream_engine.work.runner import RunReport, run
from tests.conftest import write_questions
from tests.echo_pipeline import CALLS, EchoPipeline, echo_config
from tests.processes import context

TEN = [f"what is number {i} good for" for i in range(10)]


def run_in_process(config: RunConfig) -> int | None:
    """The exit status of a process that runs the echo pipeline."""
    process = context.Process(target=_run, args=(config.to_dict(),))
    process.start()
    process.join(timeout=60)
    return process.exitcode


def _run(settings: dict[str, object]) -> None:
    pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
    os._exit(run(RunConfig.create(settings), show_progress=False).exit_status)


def plant_dead_lease(run_dir: RunDir, shard: int) -> None:
    """The lease of a worker that was killed at a shard."""
    dead = msgspec.structs.replace(this_process("dead", 60, number=1, now=0.0), process_start="1")
    path = run_dir.lease(shard_lease(shard))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(dead))


def run_on(tmp_path: Path, questions: list[str], **settings: object) -> RunReport:
    dataset = write_questions(tmp_path / "questions.jsonl", questions)
    return run(echo_config(tmp_path / "run", dataset, **settings), show_progress=False)


def test_a_record_that_kills_its_process_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    """Each restart took the same shard first and died again, for ever."""
    dataset = write_questions(tmp_path / "questions.jsonl", ["kill this", *TEN])
    config = echo_config(tmp_path / "run", dataset)
    run_dir = RunDir(config.work_dir)
    num_deaths = 0
    while (status := run_in_process(config)) == -signal.SIGKILL:
        num_deaths += 1
        if num_deaths == 2:
            assert run_dir.result("rewards", 1).exists() and run_dir.result("rewards", 2).exists()
        assert num_deaths <= MAX_DEATHS_TOGETHER + MAX_DEATHS_ALONE
    assert (num_deaths, status) == (MAX_DEATHS_TOGETHER + MAX_DEATHS_ALONE, 2)
    assert not files.list_files(run_dir.failures_dir)
    (failure,) = quarantined_by(run_dir, read_header(run_dir.result("rollouts", 0)))
    assert failure.reason == "ends_worker"


@pytest.mark.usefixtures("echo")
def test_a_record_that_loses_the_device_is_set_aside_alone(tmp_path: Path) -> None:
    """The device is lost for the records after it as well, which are not to blame."""
    for _ in range(MAX_DEATHS_TOGETHER + MAX_DEATHS_ALONE):
        with pytest.raises(DeviceLostError):
            run_on(tmp_path, [*TEN[:2], "gone for good", *TEN[2:]])
    report = run_on(tmp_path, [*TEN[:2], "gone for good", *TEN[2:]])
    assert (report.status.samples.done, report.status.samples.quarantined) == (10, 1)
    assert "ends_worker" in report.problems[0] and "device-side assert" in report.problems[0]


@pytest.mark.usefixtures("echo")
def test_no_number_of_deaths_makes_a_good_shard_fail(tmp_path: Path) -> None:
    """Preemption kills workers at whatever shard they hold."""
    run_dir = RunDir(tmp_path / "run")
    for _ in range(12):
        plant_dead_lease(run_dir, 1)
        report = run_on(tmp_path, TEN, run_stage=0, max_shard_retries=0)
        assert (report.exit_status, report.status.shards.failed) == (0, 0)
        run_dir.result("rollouts", 1).unlink()
    assert run_on(tmp_path, TEN, max_shard_retries=0).status.samples.done == 10


@pytest.mark.usefixtures("echo")
def test_a_shard_at_which_a_worker_died_comes_after_the_others(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    plant_dead_lease(run_dir, 0)
    assert run_on(tmp_path, TEN).exit_status == 0
    first_calls = [call for call in CALLS if call.startswith("rollouts")]
    assert {call.split(maxsplit=1)[1] for call in first_calls[-4:]} == set(TEN[:4])


@pytest.mark.usefixtures("echo")
def test_a_shard_that_may_end_its_worker_is_held_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard leased ahead was blamed for each death at its neighbour."""
    run_dir = RunDir(tmp_path / "run")
    held: list[int] = []
    rollouts = EchoPipeline.rollouts

    def watching(self: EchoPipeline, engines, samples, ahead=()) -> Iterator[SampleRollouts]:
        list(ahead)
        held.append(len(list_leases(run_dir.leases_dir)))
        yield from rollouts(self, engines, samples)

    monkeypatch.setattr(EchoPipeline, "rollouts", watching)
    plant_dead_lease(run_dir, 0)
    plant_dead_lease(run_dir, 1)
    assert run_on(tmp_path, TEN, look_ahead="always").exit_status == 0
    assert held[-2:] == [1, 1]


def test_deaths_do_not_put_a_shard_off_for_days(tmp_path: Path) -> None:
    """Each doubled the wait without an end: 36 hours after seventeen of them."""
    run_dir, config = RunDir(tmp_path), WorkerConfig()
    for _ in range(17):
        failure = record_failure(
            run_dir,
            WorkerDiedError("the worker that held this shard died"),
            shard=0,
            stage="rollouts",
            fingerprint="f",
            worker="w",
            config=config,
            ended_worker=True,
        )
    assert failure.num_deaths == 17
    waits = failure.retry_at - failure.time
    assert waits == pytest.approx(config.retry_backoff_s * 2**MAX_DEATHS_TOGETHER)
