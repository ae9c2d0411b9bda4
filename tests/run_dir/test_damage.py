"""A finished file that is damaged costs its own shard only, and says what mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.run_dir.failures import read_failure
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.work.runner import RunReport, run
from tests.conftest import file_states, parts, rows_file, write_questions
from tests.echo_pipeline import CALLS, echo_config
from tests.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("echo")

TEN = [f"what is number {i} good for" for i in range(10)]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A finished run of three shards."""
    run(echo_config(tmp_path / "run", write_questions(tmp_path / "q.jsonl", TEN)))
    CALLS.clear()
    return RunDir(tmp_path / "run")


def flip_a_bit(path: Path) -> bytes:
    """Change a byte in the middle of a file; returns what it held."""
    before = path.read_bytes()
    content = bytearray(before)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return before


def append(run_dir: RunDir) -> RunReport:
    more = write_questions(run_dir.root.parent / "more.jsonl", ["one thing more"], first_id=50)
    return run(echo_config(run_dir.root, more), show_progress=False)


@pytest.mark.parametrize("stage", ["rollouts", "rewards"])
def test_a_damaged_result_is_set_aside_and_the_rest_is_merged(run_dir: RunDir, stage: str) -> None:
    """One flipped bit stopped every later merge, append and retry of the whole dataset."""
    damaged = run_dir.result(stage, 1)
    flip_a_bit(damaged)
    content = damaged.read_bytes()
    report = append(run_dir)
    assert (report.exit_status, report.merged_here) == (2, True)
    assert (report.status.shards.total, report.status.shards.failed) == (4, 1)
    (problem,) = report.problems
    assert str(damaged) in problem and "checksum" in problem
    assert f"`stream-engine retry-failed {run_dir.root}` computes it again" in problem
    assert not files.exists(damaged)
    assert run_dir.damaged(stage, 1).read_bytes() == content
    assert not append(run_dir).merged_here  # it is settled: no more work, no more merges


@pytest.mark.parametrize("stage", ["rollouts", "rewards"])
def test_a_damaged_count_in_a_header_is_one_shards_damage_too(run_dir: RunDir, stage: str) -> None:
    """It was taken for a fault in the counting of the whole merge."""
    path = run_dir.result(stage, 1)
    content = bytearray(path.read_bytes())
    content[content.index(b"num_results") + len(b"num_results")] ^= 1
    path.write_bytes(content)
    report = append(run_dir)
    assert (report.merged_here, report.status.shards.failed) == (True, 1)
    assert main(["retry-failed", str(run_dir.root)]) == 0


@pytest.mark.parametrize("stage", ["rollouts", "rewards"])
def test_a_retry_computes_a_damaged_result_again(run_dir: RunDir, stage: str) -> None:
    flip_a_bit(run_dir.result(stage, 1))
    append(run_dir)
    CALLS.clear()
    assert main(["retry-failed", str(run_dir.root)]) == 0
    assert {call.split(maxsplit=1)[1] for call in CALLS} == set(TEN[4:8])
    fresh = run_dir.root.parent / "fresh"
    for name in ("q.jsonl", "more.jsonl"):
        run(echo_config(fresh, run_dir.root.parent / name), show_progress=False)
    assert parts(run_dir.dataset_dir) == parts(fresh / "dataset")


def test_rewards_of_lost_answers_are_not_used_for_new_ones(run_dir: RunDir) -> None:
    flip_a_bit(run_dir.result("rollouts", 1))
    append(run_dir)
    assert not files.exists(run_dir.result("rewards", 1))
    CALLS.clear()
    main(["retry-failed", str(run_dir.root)])
    assert {call.split()[0] for call in CALLS} == {"rollouts", "rewards"}


def test_a_damaged_tar_leaves_its_shard_out_and_says_what_mends_it(run_dir: RunDir) -> None:
    """It stopped every later merge of the whole dataset, and no remedy was named."""
    results = file_states(run_dir.root / "results")
    tar = flip_a_bit(run_dir.shard(1))
    report = append(run_dir)
    assert (report.exit_status, report.merged_here) == (2, True)
    (problem,) = report.problems
    assert str(run_dir.shard(1)) in problem and "cannot be computed again" in problem
    assert "put back a copy" in problem and "4 samples are lost" in problem
    assert report.status.shards.failed == 1
    assert TEN[5] not in {row["question"] for row in rows_of(run_dir.dataset_dir)}
    assert not append(run_dir).merged_here
    after = file_states(run_dir.root / "results")
    assert {name: after[name] for name in results} == results

    assert main(["work", str(run_dir.root), "--shard=1"]) == 1  # it once called the shard done
    assert read_failure(run_dir, 1) is not None
    assert main(["retry-failed", str(run_dir.root)]) == 2  # as long as no copy is put back
    run_dir.shard(1).write_bytes(tar)
    CALLS.clear()
    assert main(["retry-failed", str(run_dir.root)]) == 0
    assert not CALLS and read_failure(run_dir, 1) is None
    assert TEN[5] in {row["question"] for row in rows_of(run_dir.dataset_dir)}


def test_an_export_leaves_a_damaged_shard_out_too(run_dir: RunDir) -> None:
    flip_a_bit(run_dir.result("rewards", 1))
    assert main(["export", str(run_dir.root), "--format", "ms_swift_jsonl"]) == 0
    rows = rows_file(run_dir.export_dir("ms_swift_jsonl")).read_text()
    assert "number 3" in rows and "number 5" not in rows
    assert main(["status", str(run_dir.root), "--check"]) == 2


def test_a_retry_mends_damage_that_rewards_ran_into(run_dir: RunDir) -> None:
    """Rewards that read damaged rollouts failed, and failed again at every retry."""
    flip_a_bit(run_dir.result("rollouts", 1))
    run_dir.result("rewards", 1).unlink()
    assert append(run_dir).status.shards.failed == 1
    assert main(["retry-failed", str(run_dir.root)]) == 0


@pytest.mark.parametrize("kept", ["nothing", "the first line", "no file"])
def test_a_manifest_that_was_cut_is_told(echo: None, tmp_path: Path, capsys, kept: str) -> None:
    """`status --check` of a run whose manifest was emptied said that all is done."""
    dataset = write_questions(tmp_path / "q.jsonl", [f"what is {i} for" for i in range(12)])
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    assert main([*words, "--samples_per_shard=3", "--sample_k=4", "--rank=1"]) == 0
    manifest = RunDir(tmp_path / "w").manifest
    whole = manifest.read_bytes()
    first = whole.partition(b"\n")[0] + b"\n"
    manifest.write_bytes(first if kept == "the first line" else b"")
    if kept == "no file":
        manifest.unlink()
    for command in (["status", "--check"], ["validate"], ["retry-failed"]):
        capsys.readouterr()
        assert main([command[0], str(tmp_path / "w"), *command[1:]]) == 1, command
        assert "it was cut or lost. Put a copy of it back" in capsys.readouterr().err
    assert main([*words, "--samples_per_shard=3", "--sample_k=4", "--rank=1"]) == 1
    manifest.write_bytes(whole)
    assert main(["status", str(tmp_path / "w"), "--check"]) == 0


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_damaged_file_of_rejects_is_told(echo: None, tmp_path: Path, capsys, damage: str) -> None:
    """`status` passed it over, and `validate` said that all is well."""
    dataset = write_questions(tmp_path / "q.jsonl", [f"what is {i} for" for i in range(4)])
    dataset.write_text(dataset.read_text() + "{broken\n{broken\n")
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    assert main([*words, "--sample_k=4", "--rank=1"]) == 2
    (path,) = (tmp_path / "w/quarantine").iterdir()
    assert main(["validate", str(tmp_path / "w")]) == 0
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    capsys.readouterr()
    assert main(["validate", str(tmp_path / "w")]) == 2
    assert path.name in capsys.readouterr().out
