"""The merge at the end of a run: one worker does it, whatever happens while the others wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from stream_engine.cli.working import report_lines
from stream_engine.config import RunConfig
from stream_engine.pairs import merge_step, merger
from stream_engine.pairs.merger import merge
from stream_engine.pipelines import pipeline_class
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.store.leases import Lease
from stream_engine.work.runner import RunReport, run
from tests.conftest import write_questions
from tests.echo_pipeline import echo_config

pytestmark = pytest.mark.usefixtures("echo")

TEN = [f"what is number {i} good for" for i in range(10)]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return echo_config(tmp_path / "run", write_questions(tmp_path / "questions.jsonl", TEN))


@contextmanager
def waiting_for_the_merge(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, **options: object
) -> Iterator[Future[RunReport]]:
    """A run that has come to the merge, which another worker holds while the block lasts."""
    is_waiting = threading.Event()
    wait = merge_step.wait_for_lease

    def noticed(*args: object) -> Lease:
        is_waiting.set()
        return wait(*args)

    monkeypatch.setattr(merge_step, "wait_for_lease", noticed)
    other = Lease.acquire(
        RunDir(config.work_dir).leases_dir, "merge", worker_id="rank9", timeout_s=60
    )
    assert other is not None
    with ThreadPoolExecutor(1) as pool, other:
        report = pool.submit(run, config, show_progress=False, **options)
        assert is_waiting.wait(timeout=60)
        yield report


def append_shards(config: RunConfig, tmp_path: Path) -> None:
    more = write_questions(tmp_path / "more.jsonl", ["one thing more", "and another"], first_id=50)
    run(echo_config(config.work_dir, more), steps=("shard",), show_progress=False)


def test_a_worker_goes_back_to_shards_that_came_while_it_waited(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that waited for the merge while an append came in died of a missing stage."""
    with waiting_for_the_merge(config, monkeypatch) as report:
        append_shards(config, tmp_path)
    assert report.result().exit_status == 0
    assert (report.result().shards_done_here, report.result().merged_here) == (4, True)
    assert report.result().status.samples.done == 12


def test_a_merge_alone_leaves_shards_that_came_meanwhile_to_those_who_do_them(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ended with an error, though the appending run was about to build the dataset."""
    run(config, steps=("shard", "work"), show_progress=False)
    with waiting_for_the_merge(config, monkeypatch, steps=("merge",)) as report:
        append_shards(config, tmp_path)
    assert not report.result().merged_here and report.result().dataset is None
    assert "new shards came" in capsys.readouterr().err
    assert not any("up to date" in line for line in report_lines(report.result()))


def test_a_worker_that_waited_while_another_merged_reads_no_header_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker in turn read every header under the lease, to find nothing to do."""
    num_reads = 0
    read_inputs: Callable = merger.read_inputs

    def counted(*args: object) -> object:
        nonlocal num_reads
        num_reads += 1
        return read_inputs(*args)

    with waiting_for_the_merge(config, monkeypatch) as report:
        run_dir = RunDir(config.work_dir)
        fingerprints = read_run_file(run_dir).fingerprints
        merge(run_dir, config, pipeline_class("echo")(config), fingerprints)
        monkeypatch.setattr(merger, "read_inputs", counted)
    assert not report.result().merged_here and report.result().dataset is not None
    assert num_reads == 0


def test_a_worker_that_waited_while_another_merged_otherwise_merges_itself(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting_for_the_merge(config, monkeypatch) as report:
        run_dir = RunDir(config.work_dir)
        fingerprints = read_run_file(run_dir).fingerprints
        other = echo_config(config.work_dir, config.dataset_path[0], rank=1)
        merge(run_dir, other, pipeline_class("echo")(other), fingerprints)
    assert report.result().merged_here
