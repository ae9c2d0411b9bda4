"""status, inspect and validate: what they say is derived from the files alone."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_engine.cli.main import main
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.leases import Lease
from stream_engine.work.runner import run
from tests.conftest import ROOT, write_questions
from tests.echo_pipeline import echo_config

pytestmark = pytest.mark.usefixtures("echo")

TEN = [f"what is number {i} good for" for i in range(10)]
BOOM = [f"boom number {i}" for i in range(4)]


@pytest.fixture
def finished(tmp_path: Path) -> RunDir:
    """Shard 0 failed; shard 1 has a quarantined record; 2 and 3 are done; one row was rejected."""
    questions = [*BOOM, *TEN[:3], "aside with this", *TEN[3:], ""]
    dataset = write_questions(tmp_path / "questions.jsonl", questions)
    run(echo_config(tmp_path / "run", dataset), show_progress=False)
    return RunDir(tmp_path / "run")


def status_of(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, int]]:
    capsys.readouterr()
    assert main(["status", str(run_dir.root), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_counts_add_up(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = status_of(finished, capsys)
    known = {"samples", "shards", "stages", "pairs", "pictures", "workers", "waiting", "servers"}
    assert found.keys() == known | {"rounds"}
    assert found["samples"] == {"total": 16, "done": 10, "quarantined": 2, "pending": 4}
    assert found["shards"] == {"total": 4, "done": 3, "failed": 1, "running": 0, "pending": 0}
    pairs = found["pairs"]
    assert pairs["candidates"] == pairs["written"] + sum(pairs["dropped"].values()) > 0


def test_a_held_shard_is_running(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    finished.result("rewards", 2).unlink()
    lease = Lease.acquire(
        finished.leases_dir, "shard-000002", worker_id="rank3@here:1", timeout_s=60
    )
    assert lease is not None
    with lease:
        found = status_of(finished, capsys)
    assert found["shards"]["running"] == 1 and found["shards"]["pending"] == 0
    assert [(w["worker"], w["shard"]) for w in found["workers"]] == [("rank3@here:1", 2)]
    assert status_of(finished, capsys)["shards"]["pending"] == 1


def test_a_lease_of_a_dead_process_is_not_running(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.result("rewards", 2).unlink()
    code = (
        "import os; from stream_engine.store.leases import Lease;"
        "from stream_engine.run_dir.paths import RunDir;"
        f"Lease.acquire(RunDir({str(finished.root)!r}).leases_dir, 'shard-000002', worker_id='x', "
        "timeout_s=60); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert status_of(finished, capsys)["shards"]["running"] == 0


def test_status_names_every_problem(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished.root), "--check"]) == 2
    text = capsys.readouterr().out
    assert "shard 0" in text and "cannot stand" in text
    assert "too_odd" in text and "idx 7" in text
    assert "questions.jsonl row 15" in text


def test_status_of_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_shows_a_failed_shard_and_how_to_do_it_again(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["inspect", "0", str(finished.root)]) == 0
    text = capsys.readouterr().out
    assert "3 attempts" in text and "misbehave" in text
    assert f"stream-engine work {finished.root} --shard 0" in text


def test_the_command_that_inspect_prints_runs_the_shard_in_the_foreground(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="cannot stand"):
        main(["work", str(finished.root), "--shard", "0"])
    monkeypatch.setattr("tests.echo_pipeline.misbehave", lambda question, num_calls: None)
    assert main(["work", str(finished.root), "--shard", "0"]) == 0
    assert main(["merge", str(finished.root)]) == 2  # the two bad records are still set aside
    assert main(["status", str(finished.root), "--check"]) == 2
    assert not files.list_files(finished.failures_dir)


@pytest.mark.parametrize("by_key", [False, True])
def test_inspect_shows_a_sample_with_its_answers(
    finished: RunDir, by_key: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    info = Manifest.load(finished).shards[3]
    target = info.keys[0] if by_key else info.ids[0]
    capsys.readouterr()
    assert main(["inspect", target, str(finished.root)]) == 0
    text = capsys.readouterr().out
    assert "what is number 7 good for" in text
    assert text.index("what0") < text.index("what3")  # best first


def test_inspect_shows_every_sample_of_an_id_that_two_inputs_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_questions(tmp_path / "a.jsonl", TEN[:3], first_id=500)
    second = write_questions(tmp_path / "b.jsonl", TEN[5:8], first_id=500)
    report = run(echo_config(tmp_path / "run", f"{first},{second}"), show_progress=False)
    assert (report.exit_status, report.status.samples.done) == (0, 6)
    assert main(["inspect", "501", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert TEN[1] in text and TEN[6] in text


def test_inspect_of_a_shard_tells_that_a_sample_has_its_number_as_id(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever counts questions from 0 was shown a shard, and no way to the question."""
    info = Manifest.load(finished).shards[0]
    key = info.keys[info.ids.index("3")]
    assert main(["inspect", "3", str(finished.root)]) == 0
    assert f"also      the id of a sample: stream-engine inspect {key}" in capsys.readouterr().out


def test_a_command_that_is_printed_can_be_typed_whatever_the_folder_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `my run #2` the shell took the first word, and the end for a comment."""
    dataset = write_questions(tmp_path / "questions.jsonl", [TEN[0], ""])
    folder = str(tmp_path / "my run #2")
    words = ["shard", "--pipeline_name=echo", f"--work_dir={folder}", f"--dataset_path={dataset}"]
    assert main(words) == 2
    line = next(one for one in capsys.readouterr().out.splitlines() if "try these again" in one)
    assert shlex.split(line.partition(": ")[2]) == ["stream-engine", "retry-failed", folder]


def test_inspect_of_something_unknown_is_one_line(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "nonsense", str(finished.root)]) == 1
    assert "'nonsense' is no shard" in capsys.readouterr().err


def test_validate_finds_a_run_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    formats = "rlaifv,trl,ms_swift,llama_factory,ms_swift_jsonl,llama_factory_jsonl"
    run(echo_config(tmp_path / "run", dataset, format=formats), show_progress=False)
    assert main(["validate", str(tmp_path / "run")]) == 0, capsys.readouterr().out


def test_validate_says_once_that_shards_are_pending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run got two lines for each shard not begun, as if its results were short."""
    dataset = write_questions(tmp_path / "questions.jsonl", TEN)
    run(echo_config(tmp_path / "run", dataset), steps=("shard",), show_progress=False)
    assert main(["validate", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().out
    assert text.count("3 of 3 shards pending; run it again") == 1
    assert "account" not in text


def test_validate_names_a_damaged_shard_and_a_missing_result(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = finished.shard(1)
    tar.write_bytes(tar.read_bytes()[:-512])
    capsys.readouterr()
    assert main(["validate", str(finished.root)]) == 2
    text = capsys.readouterr().out
    assert str(tar) in text
    assert "shard 0: the rollouts do not account for every sample" in text


def test_validate_names_a_bad_row_of_a_dataset(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = finished.dataset_dir.glob("train-0*.parquet")
    table = pq.read_table(part)
    texts = table.column("chosen").to_pylist()
    bad = pa.array([*texts[:2], table.column("rejected")[2].as_py(), *texts[3:]])
    pq.write_table(table.set_column(table.schema.get_field_index("chosen"), "chosen", bad), part)
    capsys.readouterr()
    assert main(["validate", str(finished.dataset_dir)]) == 2
    assert "row 2" in capsys.readouterr().out


def test_validate_names_a_bad_row_of_an_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_questions(tmp_path / "questions.jsonl", [*TEN, ""])
    assert main(["validate", str(dataset)]) == 2
    text = capsys.readouterr().out
    assert "1 problems" in text and "row 10" in text
