"""retry-failed: failed shards and quarantined records are tried again, and nothing else."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from stream_engine.cli.main import main
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.leases import Lease
from stream_engine.work.runner import run
from tests import echo_pipeline
from tests.conftest import file_states, parts, write_questions
from tests.echo_pipeline import CALLS, echo_config

pytestmark = pytest.mark.usefixtures("echo")

TEN = [f"what is number {i} good for" for i in range(10)]
BAD = ["boom goes the model", "aside with this", "unscored it stays"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run over 13 questions, three of which went wrong, and a shard that cannot be read."""
    questions = [*TEN[:3], BAD[0], *TEN[3:7], BAD[1], BAD[2], *TEN[7:]]
    dataset = write_questions(tmp_path / "questions.jsonl", questions)
    config = echo_config(tmp_path / "run", dataset)
    run(config, steps=("shard",), show_progress=False)
    tar = RunDir(tmp_path / "run").shard(1)
    tar.rename(tmp_path / "kept.tar")
    report = run(config, show_progress=False)
    assert (report.status.samples.quarantined, report.status.shards.failed) == (3, 1)
    (tmp_path / "kept.tar").rename(tar)
    CALLS.clear()
    return tmp_path / "run"


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every question be answered from now on."""
    monkeypatch.setattr(echo_pipeline, "misbehave", lambda question, num_calls: None)
    monkeypatch.setattr(echo_pipeline, "SET_ASIDE", ())


def test_a_retry_computes_only_what_failed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mend(monkeypatch)
    assert main(["retry-failed", str(finished)]) == 0
    in_failed_shard = TEN[3:7]
    assert set(CALLS) == {
        *(f"{stage} {q}" for stage in ("rollouts", "rewards") for q in (*BAD, *in_failed_shard)),
    } - {"rollouts unscored it stays"}
    assert not list((finished / "quarantine").glob("*.jsonl"))
    assert not files.list_files(finished / "failures")


def test_a_retried_run_has_the_dataset_of_one_that_never_failed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend(monkeypatch)
    assert main(["retry-failed", str(finished)]) == 0
    run(echo_config(tmp_path / "fresh", tmp_path / "questions.jsonl"), show_progress=False)
    assert parts(finished / "dataset") == parts(tmp_path / "fresh/dataset")


def test_what_fails_again_is_set_aside_again_alone(finished: Path) -> None:
    """Once, a shard failed as a whole when the only record tried again raised again."""
    assert main(["retry-failed", str(finished)]) == 2
    quarantined = "".join(p.read_text() for p in (finished / "quarantine").glob("*.jsonl"))
    assert quarantined.count("\n") == 3


@pytest.mark.parametrize("stage", ["rollouts", "rewards"])
def test_a_damaged_result_that_no_run_has_noticed_is_made_again(
    finished: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """`validate` named it, and `retry-failed` put nothing back."""
    mend(monkeypatch)
    assert main(["retry-failed", str(finished)]) == 0
    path = RunDir(finished).result(stage, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["validate", str(finished)]) == 2
    assert str(path) in capsys.readouterr().out
    CALLS.clear()
    assert main(["retry-failed", str(finished)]) == 0
    assert CALLS
    capsys.readouterr()
    assert main(["validate", str(finished)]) == 0, capsys.readouterr().out


def test_requeue_only_leaves_the_work_to_the_next_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_states(finished / "shards")
    assert main(["retry-failed", str(finished), "--requeue_only"]) == 0
    assert not CALLS and main(["status", str(finished), "--check"]) == 1
    mend(monkeypatch)
    report = run(echo_config(finished, tmp_path / "questions.jsonl"), show_progress=False)
    assert report.exit_status == 0
    assert report.status.samples.done == 13
    assert file_states(finished / "shards") == before


def test_retry_is_refused_under_a_launcher(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["retry-failed", str(finished)]) == 1
    assert "--requeue_only" in capsys.readouterr().err


@pytest.mark.parametrize("requeue_only", [False, True])
def test_a_retry_takes_up_rows_whose_image_has_been_supplied(
    tmp_path: Path, requeue_only: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing read them ever again, whatever was run, although run and retry-failed said so: the
    input's own files had not changed."""
    dataset = write_questions(tmp_path / "questions.jsonl", TEN[:3])
    late = {"question_id": "late", "question": TEN[3], "image": "late.png"}
    with open(dataset, "a") as file:
        file.write(json.dumps(late) + "\n" + json.dumps({**late, "image": "never.png"}) + "\n")
    config = echo_config(tmp_path / "run", dataset)
    report = run(config, show_progress=False)
    assert (report.status.samples.done, report.status.samples.quarantined) == (3, 2)
    before = file_states(tmp_path / "run/shards")["000000.tar"]
    Image.new("RGB", (4, 4)).save(tmp_path / "late.png")
    assert run(config, show_progress=False).status.samples.quarantined == 2
    CALLS.clear()
    capsys.readouterr()
    options = ["--requeue_only"] if requeue_only else []
    assert main(["retry-failed", str(tmp_path / "run"), *options]) == (0 if requeue_only else 2)
    assert "2 records were rejected" in capsys.readouterr().out
    report = run(config, show_progress=False)
    assert (report.status.samples.done, report.status.samples.quarantined) == (4, 1)
    assert all("number 3" in call for call in CALLS)
    assert file_states(tmp_path / "run/shards")["000000.tar"] == before
    lines = (tmp_path / "run/shards/manifest.jsonl").read_text()
    assert run(config, show_progress=False).exit_status == 2
    assert (tmp_path / "run/shards/manifest.jsonl").read_text() == lines, "read again unasked"


@pytest.mark.parametrize("which", ["manifest", "rollouts/000000", "failures/000001"])
def test_a_retry_that_was_interrupted_is_finished_by_the_next_one(
    finished: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """It was told that another process had written the file, and ended."""
    with (finished.parent / "questions.jsonl").open("a") as file:
        file.write("{broken\n")
    run(echo_config(finished, finished.parent / "questions.jsonl"), show_progress=False)
    mend(monkeypatch)
    rename, failures = os.rename, [OSError(errno.EIO, "Input/output error")]

    def failing(source, target):
        if failures and which in str(target):
            raise failures.pop()
        return rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert main(["retry-failed", str(finished), "--requeue_only"]) == 1
    assert not failures
    assert main(["retry-failed", str(finished), "--requeue_only"]) == 0


def test_a_retry_waits_for_no_reader_of_the_input(finished: Path, capsys) -> None:
    lease = Lease.acquire(
        RunDir(finished).leases_dir, "ingest", worker_id="another", timeout_s=60.0
    )
    assert lease is not None
    with lease:
        assert main(["retry-failed", str(finished)]) == 1
    assert "a worker is reading the input" in capsys.readouterr().err


@pytest.mark.parametrize("requeue_only", [False, True])
def test_an_appended_input_keeps_its_limit_when_it_is_read_again(
    tmp_path: Path, requeue_only: bool
) -> None:
    """A retry read all that the limit had left out; and after --requeue_only a run that named the
    first input alone read nothing again."""
    first = write_questions(tmp_path / "first.jsonl", TEN[:2])
    config = echo_config(tmp_path / "run", first)
    run(config, show_progress=False)
    second = tmp_path / "second.jsonl"
    rows = [{"question_id": f"s{i}", "question": TEN[i], "image": f"{i}.png"} for i in range(6)]
    second.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["append", str(tmp_path / "run"), f"--dataset_path={second}", "--max_samples=2"]
    assert main(words) == 2
    for number in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    options = ["--requeue_only"] if requeue_only else []
    assert main(["retry-failed", str(tmp_path / "run"), *options]) == 0
    report = run(config, show_progress=False)
    assert (report.status.samples.done, report.status.samples.quarantined) == (4, 0)
