"""A run file with rounds: one file, and each call goes on with the next that is not finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from tests.conftest import write_questions
from tests.echo_pipeline import CALLS

pytestmark = pytest.mark.usefixtures("echo")

TWELVE = [f"what is number {i} good for" for i in range(12)]


def run_file(tmp_path: Path, *rounds: str) -> str:
    """A file with these rounds, of four questions each."""
    if not (tmp_path / "questions.jsonl").exists():
        write_questions(tmp_path / "questions.jsonl", TWELVE)
    for name in ("start", "first"):
        (tmp_path / name).mkdir(exist_ok=True)
    lines = [
        "pipeline-name: echo",
        f"work_dir: {tmp_path / 'run'}",
        f"dataset_path: {tmp_path / 'questions.jsonl'}",
        "sample_k: 4",
        "rank: 1",
        "questions: 4",
        "report: never",
        "rounds:",
        *(f"  - {entry}" for entry in rounds),
    ]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_same_line_goes_on_with_the_next_round_that_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [
        f"instruct_model_path: {tmp_path / 'start'}",
        f"instruct-model-path: {tmp_path / 'first'}",
        f"{{instruct_model_path: {tmp_path / 'second'}, questions: 2}}",
    ]
    path = run_file(tmp_path, *rounds)
    assert main(["run", "--config", path]) == 0
    told = capsys.readouterr().out
    assert "round 3 of 3 waits for its model" in told
    assert f"Train it on {tmp_path / 'run/rounds/2/dataset'}" in told
    found = read_run_file(RunDir(tmp_path / "run"))
    assert [Path(one.settings["instruct_model_path"]).name for one in found.every_round] == [
        "start",
        "first",
    ]
    CALLS.clear()
    (tmp_path / "second").mkdir()
    assert main(["run", "--config", path]) == 0
    asked = {call for call in CALLS if call.startswith("rollouts")}
    assert asked == {f"rollouts {question}" for question in TWELVE[8:10]}
    CALLS.clear()
    assert main(["run", "--config", path]) == 0
    assert not CALLS
    main(["status", str(tmp_path / "run"), "--json"])
    status = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["samples"]["done"] for one in status["rounds"]] == [4, 4, 2]


@pytest.mark.parametrize(
    ("rounds", "words", "message"),
    [
        pytest.param(["4"], [], "round 1 must hold what differs in it", id="no-names"),
        pytest.param(
            ["{instruct_model_path: /a}", "{rank: 1}"],
            [],
            "round 2: rank holds for all rounds: put it beside `rounds`",
            id="of-all",
        ),
        pytest.param(["{questions: many}"], [], "round 1: bad setting: ", id="value"),
        pytest.param(
            ["{qestions: 3}"], [], "round 1: unknown setting 'qestions'; did you", id="name"
        ),
        pytest.param(["{questions: 3}"], ["--questions=2"], "--questions: {path} has", id="flag"),
    ],
)
def test_a_bad_entry_is_named_with_its_file_and_round(
    rounds: list[str],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = run_file(tmp_path, *rounds)
    assert main(["run", "--config", path, *words]) == 1
    error = capsys.readouterr().err
    assert path in error and message.format(path=path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_round_that_is_over_is_not_rewritten_and_other_commands_refuse_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, first = (f"instruct_model_path: {tmp_path / name}" for name in ("start", "first"))
    assert main(["run", "--config", run_file(tmp_path, start, first)]) == 0
    assert main(["plan", "--config", run_file(tmp_path, start, first), "--device=cpu"]) == 0
    assert "\nround 2 of 2:\n" in capsys.readouterr().out
    assert main(["run", "--config", run_file(tmp_path, first, first)]) == 1
    assert "round 1 is over, and had instruct_model_path" in capsys.readouterr().err
    assert main(["run", "--config", run_file(tmp_path, start)]) == 1
    assert "has 1 rounds, but the run is at round 2" in capsys.readouterr().err
    path = run_file(tmp_path, start, first)
    assert main(["merge", str(tmp_path / "run"), "--config", path]) == 1
    assert "`rounds` is for `stream-engine run` and `plan` alone" in capsys.readouterr().err
