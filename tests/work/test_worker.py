"""The worker's loop, with a pipeline that misbehaves on demand (tests/echo_pipeline.py)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from stream_engine.config import RunConfig
from stream_engine.errors import (
    ConfigError,
    DeviceLostError,
    MissingStageError,
    StreamEngineError,
)
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.failures import read_failure
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.leases import list_leases
from stream_engine.work import reading, shard_work
from stream_engine.work.progress import ProgressView
from stream_engine.work.runner import RunReport, begin, run
from stream_engine.work.signals import exit_on_signals
from stream_engine.work.worker import Worker
from tests.conftest import file_states, parts, write_questions
from tests.echo_pipeline import CALLS, echo_config

pytestmark = pytest.mark.usefixtures("echo")

TEN = [f"what is number {i} good for" for i in range(10)]


def run_on(tmp_path: Path, questions: list[str], **settings: object) -> RunReport:
    dataset = tmp_path / "questions.jsonl"
    if not dataset.exists():
        write_questions(dataset, questions)
    return run(echo_config(tmp_path / "run", dataset, **settings), show_progress=False)


def test_every_sample_gets_a_result_and_the_dataset_is_written(tmp_path: Path) -> None:
    report = run_on(tmp_path, TEN)
    assert report.exit_status == 0, report.problems
    assert (report.status.samples.total, report.status.samples.done) == (10, 10)
    assert (report.status.shards.total, report.status.shards.done) == (3, 3)
    assert report.dataset is not None and list(Path(report.dataset).glob("*.parquet"))
    assert report.status.pairs.written > 0


def test_a_finished_run_repeated_touches_nothing(tmp_path: Path) -> None:
    run_on(tmp_path, TEN)
    before = file_states(tmp_path / "run")
    CALLS.clear()
    report = run_on(tmp_path, TEN)
    after = file_states(tmp_path / "run")
    for folder in ("results", "shards", "dataset", "run.json"):
        assert {n: s for n, s in before.items() if n.startswith(folder)} == {
            n: s for n, s in after.items() if n.startswith(folder)
        }
    assert not CALLS
    assert (report.shards_done_here, report.merged_here, report.exit_status) == (0, False, 0)


def test_a_record_that_raises_is_quarantined_alone(tmp_path: Path) -> None:
    report = run_on(tmp_path, [*TEN[:5], "boom goes the model", *TEN[5:]])
    assert report.exit_status == 2
    assert report.status.samples.done == 10
    assert report.status.samples.quarantined == 1
    assert report.status.shards.failed == 0
    (problem,) = report.problems
    assert "idx 5" in problem and "cannot stand 'boom goes the model'" in problem


def test_a_shard_that_raises_once_is_tried_again(tmp_path: Path) -> None:
    report = run_on(tmp_path, ["flaky at first", *TEN])
    assert report.exit_status == 0
    assert report.status.samples.done == 11
    assert not files.list_files(tmp_path / "run/failures")


def test_records_set_aside_by_a_stage_are_named_and_counted(tmp_path: Path) -> None:
    report = run_on(tmp_path, [*TEN, "aside with this", "unscored it stays"])
    assert report.exit_status == 2
    assert report.status.samples.quarantined == 2
    assert report.status.stages["rollouts"].quarantined == 1
    assert report.status.stages["rewards"].quarantined == 1
    assert any("too_odd" in problem and "idx 10" in problem for problem in report.problems)
    assert any("no_verdict" in problem and "idx 11" in problem for problem in report.problems)


def test_a_shard_of_bad_records_alone_fails_and_the_others_go_on(tmp_path: Path) -> None:
    boom = [f"boom number {i}" for i in range(4)]
    report = run_on(tmp_path, [*boom, *TEN])
    assert report.exit_status == 2
    assert report.status.shards.failed == 1
    assert report.status.samples.done == 10
    failure = read_failure(RunDir(tmp_path / "run"), 0)
    assert failure is not None and failure.attempts == 3
    assert "RuntimeError: cannot stand" in failure.error
    assert "misbehave" in failure.traceback


def test_a_worker_that_fails_everything_stops_before_it_spoils_all_shards(tmp_path: Path) -> None:
    with pytest.raises(StreamEngineError, match=r"no record of 2 shards.*retry-failed"):
        run_on(tmp_path, [f"boom number {i}" for i in range(40)], max_bad_fraction=1.0)
    assert len({call for call in CALLS if call.startswith("rollouts")}) <= 12


def test_a_worker_that_lost_its_device_ends_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """It went on, and every record of every shard that it touched failed with the same error."""
    with pytest.raises(DeviceLostError, match=r"shard 0 .*same command.*device-side assert"):
        run_on(tmp_path, ["lost at first", *TEN])
    failure = read_failure(RunDir(tmp_path / "run"), 0)
    assert failure is not None and failure.num_deaths == 1
    assert not list_leases(tmp_path / "run/leases")
    assert {call.split(maxsplit=1)[1] for call in CALLS} <= {"lost at first", *TEN[:3]}
    report = run_on(tmp_path, ["lost at first", *TEN])
    assert (report.status.samples.done, report.exit_status) == (11, 0)


def test_records_that_all_fail_in_the_model_fail_their_shard(tmp_path: Path) -> None:
    """They were set aside one and all, and the shard counted as done."""
    report = run_on(tmp_path, [*(f"broken in {i}" for i in range(4)), *TEN, "broken alone"])
    assert (report.status.shards.failed, report.status.samples.quarantined) == (1, 1)
    failure = read_failure(RunDir(tmp_path / "run"), 0)
    assert failure is not None and failure.attempts == 3
    assert "4 failed in a model's forward, the last with: no such token" in failure.error


def test_a_truncated_shard_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    config = echo_config(tmp_path / "run", dataset)
    run(config, steps=("shard",), show_progress=False)
    tar = RunDir(tmp_path / "run").shard(1)
    tar.write_bytes(tar.read_bytes()[:2048])
    report = run(config, show_progress=False)
    assert report.exit_status == 2
    assert report.status.samples.done == 6
    (problem,) = report.problems
    assert str(tar) in problem and "3 attempts" in problem


def test_a_failed_shard_is_left_alone_until_a_retry(tmp_path: Path) -> None:
    boom = [f"boom number {i}" for i in range(4)]
    run_on(tmp_path, [*boom, *TEN])
    CALLS.clear()
    report = run_on(tmp_path, [*boom, *TEN])
    assert not CALLS
    assert report.exit_status == 2


def test_settings_that_no_retry_can_mend_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not go together"):
        run_on(tmp_path, [*TEN, "settings are wrong"])
    assert not files.list_files(tmp_path / "run/failures")
    assert not list_leases(tmp_path / "run/leases")


def test_plainly_bad_data_stop_the_run_early(tmp_path: Path) -> None:
    questions = [f"aside with {i}" for i in range(300)] + TEN
    with pytest.raises(ConfigError, match=r"samples were set aside.*by rollouts.*retry-failed"):
        run_on(tmp_path, questions, samples_per_shard=50)
    assert CALLS.total() < 300


def test_plainly_bad_input_stops_the_run_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reader rejected .*empty_question.*correct the input"):
        run_on(tmp_path, [""] * 250 + TEN)
    assert not CALLS


def test_a_small_share_of_rejected_records_stops_nothing(tmp_path: Path) -> None:
    """Rejected records were set against finished samples, of which there are none at first."""
    questions = [f"what is {i}" for i in range(600)] + [""] * 250
    report = run_on(tmp_path, questions, samples_per_shard=300)
    assert (report.status.samples.done, report.status.samples.quarantined) == (600, 250)


def test_stages_run_one_by_one_give_the_same_dataset(tmp_path: Path) -> None:
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    run(echo_config(tmp_path / "fused", dataset), show_progress=False)
    for stage in (0, 1, 2):
        report = run(
            echo_config(tmp_path / "staged", dataset, run_stage=stage), show_progress=False
        )
        assert report.exit_status == 0
    assert parts(tmp_path / "fused/dataset") == parts(tmp_path / "staged/dataset")


@pytest.mark.parametrize(("stage", "command"), [(1, "--run_stage 0"), (2, "--run_stage 0")])
def test_a_missing_earlier_stage_is_an_error_that_says_what_to_run(
    tmp_path: Path, stage: int, command: str
) -> None:
    with pytest.raises(MissingStageError, match=command):
        run_on(tmp_path, TEN, run_stage=stage)


def test_a_half_done_earlier_stage_is_missing_too(tmp_path: Path) -> None:
    run_on(tmp_path, TEN, run_stage=0)
    run_on(tmp_path, TEN, run_stage=1)
    RunDir(tmp_path / "run").result("rewards", 1).unlink()
    with pytest.raises(MissingStageError, match=r"1 of 3 shards.*--run_stage 1"):
        run_on(tmp_path, TEN, run_stage=2)


@pytest.mark.parametrize("stage", ["rollouts", "rewards"])
def test_a_torn_result_is_made_again(tmp_path: Path, stage: str) -> None:
    run_on(tmp_path, TEN)
    before = parts(tmp_path / "run/dataset")
    path = RunDir(tmp_path / "run").result(stage, 1)
    path.write_bytes(path.read_bytes()[:-20])
    CALLS.clear()
    report = run_on(tmp_path, TEN)
    assert report.exit_status == 0 and report.shards_done_here == 1
    assert {call.split()[0] for call in CALLS} == {stage}
    assert parts(tmp_path / "run/dataset") == before


def test_a_result_that_cannot_be_read_back_is_an_attempt_and_not_made_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses what is written made the same shard go round without end."""
    write_results = shard_work.write_results

    def lossy(run_dir: RunDir, header: Any, *arguments: Any, over: str | None) -> None:
        write_results(run_dir, header, *arguments, over=over)
        if header.shard == 1:
            path = run_dir.result(header.stage, header.shard)
            path.write_bytes(path.read_bytes()[:-20])

    monkeypatch.setattr(shard_work, "write_results", lossy)
    report = run_on(tmp_path, TEN)
    assert report.exit_status == 2 and report.status.shards.failed == 1
    (problem,) = report.problems
    assert "the file is cut or changed at its end" in problem and "(3 attempts)" in problem


def test_appended_input_is_computed_alone(tmp_path: Path) -> None:
    run_on(tmp_path, TEN)
    before = file_states(tmp_path / "run/results")
    CALLS.clear()
    rows = [*TEN[5:], *(f"what else is {i} for" for i in range(5))]
    more = write_questions(tmp_path / "more.jsonl", rows, first_id=5)
    report = run(echo_config(tmp_path / "run", more), show_progress=False)
    assert report.status.samples.done == 15
    assert {call.split(maxsplit=1)[1] for call in CALLS} == set(rows[5:])
    after = file_states(tmp_path / "run/results")
    assert {name: after[name] for name in before} == before


def test_no_records_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no samples"):
        run(echo_config(tmp_path / "run", tmp_path / "empty.jsonl"), show_progress=False)


def test_input_of_rejects_only_ends_with_every_one_named(tmp_path: Path) -> None:
    report = run_on(tmp_path, ["", " "])
    assert report.exit_status == 2
    assert len(report.problems) == 2
    assert report.dataset is None


def test_shards_are_cut_as_the_settings_say(tmp_path: Path) -> None:
    run_on(tmp_path, TEN, samples_per_shard=7)
    manifest = Manifest.load(RunDir(tmp_path / "run"))
    assert [info.num_samples for info in manifest.shards] == [7, 3]


def test_the_run_function_is_public(tmp_path: Path) -> None:
    import stream_engine

    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    config = echo_config(tmp_path / "run", dataset)
    assert isinstance(config, stream_engine.RunConfig) and RunConfig is stream_engine.RunConfig
    assert stream_engine.run(config, show_progress=False).exit_status == 0


def make_worker(config: RunConfig, number: int) -> Worker:
    """One of two workers of a run."""
    rank = Rank(rank=number, world_size=2)
    run_dir = RunDir(config.work_dir)
    pipeline = pipeline_class(config.pipeline_name)(config)
    fingerprints = begin(run_dir, config, pipeline, rank).fingerprints
    view = ProgressView(silent=True)
    return Worker(run_dir, config, pipeline, fingerprints, rank=rank, view=view)


@pytest.mark.parametrize("change", ["unreadable-file", "another-time"])
def test_an_input_is_read_once_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Each worker in turn read the whole input when one of its files could not be read, or when
    its nodes saw different times of change: 64 workers, 64 times."""
    folder = tmp_path / "data"
    folder.mkdir()
    dataset = write_questions(folder / "a.jsonl", TEN)
    if change == "unreadable-file":
        (folder / "b.parquet").write_bytes(b"no parquet")
    config = echo_config(tmp_path / "run", folder)
    first, second = make_worker(config, 0), make_worker(config, 1)
    reads: list[list[str]] = []
    ingest = reading.ingest

    def watched(run_dir, sources, settings, **options):
        reads.append(list(sources))
        return ingest(run_dir, sources, settings, **options)

    monkeypatch.setattr(reading, "ingest", watched)
    lease = second.inputs.lease

    def lease_when_the_first_has_read():
        if not reads:
            if change == "another-time":
                os.utime(dataset, (1000, 1000))
            first.work(do_shards=False)
            return None
        return lease()

    monkeypatch.setattr(second.inputs, "lease", lease_when_the_first_has_read)
    second.work(do_shards=False)
    assert reads == [[str(folder)]]
    assert not second.inputs.unread_sources()
    make_worker(config, 0).work(do_shards=False)
    tries_again = change == "unreadable-file"
    assert len(reads) == 1 + tries_again


def test_a_signal_that_becomes_another_error_still_ends_with_143(tmp_path: Path) -> None:
    """It may come while a lock is taken, which then cannot be released: that ended with 1."""
    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(SystemExit) as raised, exit_on_signals(run_dir, "w"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except SystemExit:
            raise RuntimeError("release unlocked lock") from None
    assert raised.value.code == 143
    with pytest.raises(RuntimeError, match="its own"), exit_on_signals(run_dir, "w"):
        raise RuntimeError("its own")
