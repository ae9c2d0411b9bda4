"""RunState follows the files, also where reading one fails for a moment."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Callable, Container
from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.config import STAGES, Stage
from stream_engine.errors import ShardReadError
from stream_engine.run_dir import state as run_state
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import ResultHeader, path_of, read_header
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.state import RunState, shard_lease
from stream_engine.store import files
from stream_engine.store.base import Entry, Location, all_names
from stream_engine.store.leases import Lease, LeaseInfo, list_leases
from stream_engine.work import order, worker
from stream_engine.work.runner import run
from stream_engine.work.worker import Worker
from tests.conftest import write_questions
from tests.echo_pipeline import CALLS, echo_config

pytestmark = pytest.mark.usefixtures("echo")

ECHO = {"pipeline_name": "echo", "sample_k": 4, "rank": 2, "samples_per_shard": 4}
TEN = [f"what is number {i} good for" for i in range(10)]


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    """Of a finished run of three shards; not refreshed yet."""
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    run(echo_config(tmp_path / "run", dataset), show_progress=False)
    run_dir = RunDir(tmp_path / "run")
    return RunState(run_dir, read_run_file(run_dir).fingerprints, max_shard_retries=2)


def fail_reads(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the first reads of shard 1's rollouts fail as on a network file system."""
    left = [times]

    def read(file: Location | Entry) -> ResultHeader:
        path = path_of(file)
        if path.parent.name == "rollouts" and path.stem == "000001" and left[0]:
            left[0] -= 1
            raise ShardReadError(path, "input/output error") from OSError(errno.EIO, "EIO")
        return read_header(file)

    monkeypatch.setattr(run_state, "read_header", read)


def test_a_result_that_could_not_be_read_once_is_read_again(
    state: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as missing for good, so that its shard was leased and found done without end."""
    fail_reads(monkeypatch, times=1)
    assert not state.refresh().is_complete("rollouts", state.shards[1])
    assert state.refresh().is_complete("rollouts", state.shards[1])


def test_a_run_with_an_unreadable_result_ends_and_computes_nothing_again(
    state: RunState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_reads(monkeypatch, times=2)
    CALLS.clear()
    report = run(echo_config(tmp_path / "run", tmp_path / "questions.jsonl"), show_progress=False)
    assert report.exit_status == 0
    assert not CALLS


def test_a_worker_looks_only_for_what_is_missing_and_at_the_end_for_all(
    state: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look read the attributes of every result: on a network file system a request each."""
    state.refresh()
    (shard, *_), path = state.shards, state.run_dir.result("rollouts", 0)
    files.remove(path, files.version_of(path) or "")
    looked: list[bool] = []

    def listed(folder: Path, *, wanted: Callable[[str], bool] = all_names) -> list[Entry]:
        found = list_files(folder, wanted=wanted)
        looked.extend(folder.parent.name == "results" for _ in found)
        return found

    list_files = files.list_files
    monkeypatch.setattr(files, "list_files", listed)
    state.refresh(max_age_s=1e-9)
    assert not any(looked)
    assert not state.unsettled(STAGES)
    state.refresh()
    assert list(state.unsettled(STAGES)) == [0]
    assert not state.is_complete("rewards", shard)
    assert set(state.unsettled(("rewards",))) == {0}


def fail_refreshes(monkeypatch: pytest.MonkeyPatch, which: Container[int]) -> None:
    """Let these of all refreshes fail as when a file server is started again."""
    count = itertools.count()
    refresh_results = RunState._refresh_results

    def refresh(self: RunState, stage: Stage, *, only_missing: bool) -> None:
        if stage == "rollouts" and next(count) in which:
            raise OSError(errno.EIO, "Input/output error", "results/rollouts")
        refresh_results(self, stage, only_missing=only_missing)

    monkeypatch.setattr(RunState, "_refresh_results", refresh)
    monkeypatch.setattr(worker, "TROUBLE_WAIT_S", 0.01)


def test_a_worker_outlives_a_file_system_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first failed look at the run directory ended it, and its launcher then all others."""
    fail_refreshes(monkeypatch, range(3, 7))
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    report = run(echo_config(tmp_path / "run", dataset), show_progress=False)
    assert (report.exit_status, report.status.samples.done) == (0, 10)


def test_a_waiting_worker_spends_little_time_on_looking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listed all folders four times a second, however long that took."""
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    config = echo_config(tmp_path / "run", dataset)
    run(config, steps=("shard",), show_progress=False)
    lease = Lease.acquire(
        RunDir(tmp_path / "run").leases_dir, shard_lease(1), worker_id="far", timeout_s=60
    )
    assert lease is not None
    num_waits = num_looks = 0

    def slow_list(folder: Path, **options: float) -> list[LeaseInfo]:
        nonlocal num_looks
        num_looks += 1
        time.sleep(0.1)  # 20 times that is how old its sight of things may get
        return list_leases(folder, **options)

    def wait(self: Worker, doing: str, **_: object) -> None:
        nonlocal num_waits, num_looks
        num_waits += doing == "waiting for far (shard 1)"
        if num_waits == 1:
            num_looks = 0
        elif num_waits == 20:
            assert num_looks <= 2
            lease.release()

    monkeypatch.setattr(run_state, "list_leases", slow_list)
    monkeypatch.setattr(Worker, "show", wait)
    monkeypatch.setattr(order, "IDLE_S", 0.05)
    assert run(config, show_progress=False).exit_status == 0
    assert num_waits >= 20


def test_a_file_system_that_fails_for_good_ends_the_command_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended with a traceback."""
    fail_refreshes(monkeypatch, range(3, 10**9))
    monkeypatch.setattr(worker, "TROUBLE_PATIENCE_S", 0.1)
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    words = [f"--{name}={value}" for name, value in ECHO.items()]
    assert main(["run", *words, f"--dataset_path={dataset}", f"--work_dir={tmp_path}/run"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stream-engine: OSError: [Errno 5] Input/output error")
    assert last.endswith("the same command resumes")
