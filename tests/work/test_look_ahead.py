"""A worker that begins its next shard early: leases, failures, and the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_engine.records import SampleRollouts
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from stream_engine.store.leases import Lease, list_leases
from stream_engine.work.runner import RunReport, run
from tests.conftest import write_questions
from tests.echo_pipeline import AHEAD, CALLS, EchoPipeline, echo_config
from tests.processes import run_rank

TEN = [f"what is number {i} good for" for i in range(10)]
EAGER = {"look_ahead": "always", "pipeline_options": {"looks_ahead": True}}


def run_on(tmp_path: Path, questions: list[str], **settings: object) -> RunReport:
    dataset = write_questions(tmp_path / "questions.jsonl", questions)
    return run(echo_config(tmp_path / "run", dataset, **settings), show_progress=False)


@pytest.mark.usefixtures("echo")
def test_each_shard_is_offered_the_one_after_it(tmp_path: Path) -> None:
    report = run_on(tmp_path, TEN, **EAGER)
    assert report.exit_status == 0
    assert list(AHEAD) == [TEN[4:8], TEN[8:], []]
    assert not list_leases(RunDir(tmp_path / "run").leases_dir)


@pytest.mark.usefixtures("echo")
def test_nothing_is_offered_unless_asked_for(tmp_path: Path) -> None:
    run_on(tmp_path, TEN, pipeline_options={"looks_ahead": True})
    assert list(AHEAD) == [[], [], []], "on CPU a batch must not depend on timing"


@pytest.mark.usefixtures("echo")
def test_the_next_shard_is_leased_while_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path / "run")
    held: list[list[str]] = []

    def watching(self: EchoPipeline, engines, samples, ahead=()) -> Iterator[SampleRollouts]:
        for _ in ahead:
            pass
        held.append([lease.name for lease in list_leases(run_dir.leases_dir)])
        yield from rollouts(self, engines, samples)

    rollouts = EchoPipeline.rollouts
    monkeypatch.setattr(EchoPipeline, "rollouts", watching)
    report = run_on(tmp_path, TEN, look_ahead="always")
    assert report.exit_status == 0
    assert [len(names) for names in held] == [2, 2, 1]
    assert all("000001" in name or "000002" in name for name in (held[0][1], held[1][1]))


@pytest.mark.usefixtures("echo")
def test_a_shard_that_another_worker_holds_is_not_begun(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_on(tmp_path, TEN, run_stage=0, max_shard_retries=0)
    for shard in range(3):
        run_dir.result("rollouts", shard).unlink()
    lease = Lease.acquire(run_dir.leases_dir, "shard-000001", worker_id="another", timeout_s=0.5)
    assert lease is not None
    AHEAD.clear()
    lease._stop.set()  # its process is alive but beats no more: it goes stale during the run
    run_on(tmp_path, TEN, run_stage=0, lease_timeout_s=1.0, **EAGER)
    assert list(AHEAD) == [TEN[8:], [], []]


@pytest.mark.usefixtures("echo")
def test_a_failing_shard_leaves_the_next_one_whole(tmp_path: Path) -> None:
    report = run_on(tmp_path, ["flaky at first", *TEN], **EAGER)
    assert report.exit_status == 0
    assert report.status.samples.done == 11
    assert max(CALLS[f"rollouts {question}"] for question in TEN[3:]) == 1


def test_answers_and_scores_are_those_of_a_run_that_does_not(
    demo_questions: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = [
        "run",
        "--demo",
        "--sample_k=4",
        "--rank=2",
        "--samples_per_shard=3",
        "--max_samples=9",
    ]
    words += ["--dataset_path", demo_questions, "--work_dir"]
    drawn = {}
    for choice in ("never", "always"):
        folder = tmp_path / choice
        assert run_rank([*words, folder, "--look_ahead", choice], log=log) == 0, log.read_text()
        drawn[choice] = {
            record.key: record.answers
            for path in sorted((folder / "results/rollouts").glob("*.msgpack"))
            for record in read_results(path, SampleRollouts)
        }
    assert len(drawn["never"]) == 9
    assert drawn["always"].keys() == drawn["never"].keys()
    for key, answers in drawn["never"].items():
        for one, other in zip(answers, drawn["always"][key], strict=True):
            assert one.token_ids == other.token_ids
            assert one.token_logps == pytest.approx(other.token_logps, abs=1e-4)
