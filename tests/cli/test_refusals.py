"""What the command line refuses, before any work, and in which words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.config import RunConfig
from stream_engine.config_file import load_config_file
from stream_engine.demo import checkpoint_path
from stream_engine.errors import ConfigError
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.work.runner import run
from tests.conftest import write_questions
from tests.echo_pipeline import echo_config
from tests.samples import picture, write_parquet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["runn"], "did you mean 'run'", id="command"),
        pytest.param(
            ["run", "--work_dir", "{tmp}/w"], "needs --instruct_model_path", id="no-model"
        ),
        pytest.param(
            [
                "run",
                "--work_dir",
                "{tmp}/w",
                "--instruct_model_path",
                "/no",
                "--reward_model_path",
                "/no",
            ],
            "/no is not a directory",
            id="no-checkpoint",
        ),
        pytest.param(["append", "{tmp}"], "holds no run", id="append-to-nothing"),
        pytest.param(["inspect", "3", "{tmp}"], "holds no run", id="inspect-nothing"),
        pytest.param(["demo", "data", "{tmp}/x.parquet", "--count", "0"], "count 0", id="demo"),
        pytest.param(["validate", "{tmp}/nothing"], "does not exist", id="validate-nothing"),
    ],
)
def test_a_user_error_is_one_line_and_status_1(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp=tmp_path) for word in words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_reward_model_that_is_the_instruct_model_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the instruct model as reward model ran to its end, and wrote pairs ranked by
    rounding noise."""
    shutil.copytree(checkpoint_path("instruct"), tmp_path / "copy")
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this"])
    words = [command, "--work_dir", tmp_path / "w", "--dataset_path", dataset]
    words += ["--instruct_model_path", checkpoint_path("instruct")]
    assert main([*map(str, words), "--reward_model_path", str(tmp_path / "copy")]) == 1
    assert "copy is the instruct model itself; a reward is the difference" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("dataset", "work_dir", "message"),
    [
        pytest.param("nothing.jsonl", "w", "nothing.jsonl' does not exist", id="no-dataset"),
        pytest.param("empty", "w", "empty' is an empty folder", id="empty-folder"),
        pytest.param("", "w", "no input: give --dataset_path", id="no-input"),
        pytest.param("q.jsonl", "q.jsonl/w", "q.jsonl is not a folder", id="below-a-file"),
        pytest.param("q.jsonl", "locked/w", "no access to {tmp}/locked", id="read-only"),
    ],
)
def test_plan_refuses_the_paths_that_a_run_refuses(
    command: str,
    dataset: str,
    work_dir: str,
    message: str,
    echo: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`plan` looked at neither, so that the launch script, which plans first, started workers that
    fell one by one; an empty folder was said not to exist."""
    write_questions(tmp_path / "q.jsonl", ["what is this"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "locked").mkdir()
    access = os.access  # root may write where the mode says no
    locked = tmp_path / "locked"
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and access(path, mode))
    words = [command, "--pipeline_name=echo", f"--work_dir={tmp_path}/{work_dir}"]
    words += [f"--dataset_path={tmp_path}/{dataset}"] if dataset else []
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error and "Traceback" not in error


@pytest.mark.parametrize(
    "words",
    [
        "run --demo --work_dir https://host/run",
        "run --pipeline_name echo --work_dir file:///run --dataset_path {questions}",
        "shard hf://datasets/a/run --pipeline_name echo --dataset_path {questions}",
        "plan --demo --work_dir https://host/run",
        "status https://host/run",
        "export {run} --format trl --out https://host/pairs",
    ],
)
def test_a_url_that_cannot_be_written_to_is_refused_before_any_work(
    echo: None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It became the local folder `s3:`, in which all was computed until the merge crashed."""
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this for"])
    run_dir = tmp_path / "run"
    if "{run}" in words:
        run(echo_config(run_dir, dataset), show_progress=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()
    assert main(words.format(questions=dataset, run=run_dir).split()) == 1
    error = capsys.readouterr().err
    assert "is a URL that cannot be written to" in error and error.count("\n") == 1
    assert not any((tmp_path / "here").iterdir())


def test_an_unknown_format_is_refused_before_any_work(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this"])
    words = (
        f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset} --format trll"
    )
    assert main(words.split()) == 1
    assert "did you mean 'trl'" in capsys.readouterr().err
    assert not (tmp_path / "w/shards").exists()


@pytest.mark.parametrize(
    "word",
    ["--rank=1", "--seed=9", "--sample_k=40", "--instruct_model_path=/x", "--config=a.yaml"],
)
def test_export_refuses_settings_that_shape_no_export(
    word: str, echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were accepted: the card named a model and sampling values that made nothing of the
    dataset, and `--rank` wrote another selection than the run's."""
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this for"])
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    assert main(words) == 0
    capsys.readouterr()
    assert main(["export", f"{tmp_path}/w", "--format", "trl", word]) == 1
    assert f"unknown flag {word.partition('=')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "w/dataset_trl").exists()


def test_a_misnamed_column_is_named_by_validate_and_by_the_run(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`image_file` was passed over without a word, and the pictures were never seen."""
    dataset = tmp_path / "q.jsonl"
    rows = [{"question": f"what is {i} for", "image_file": f"{i}.png"} for i in range(3)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "columns not read: image_file; pictures come from image, images, image_path"
    assert main(["validate", str(dataset)]) == 2
    assert capsys.readouterr().out.count(line) == 1
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    assert main(words) == 1
    assert "Columns: question, image_file; pictures are read from" in capsys.readouterr().err
    assert read_run_file(RunDir(tmp_path / "w")).settings["dataset_path"] == []
    main([*words, "--text_only", "allow"])
    shown = capsys.readouterr()
    assert shown.out.count(line) == shown.err.count(line) == 1


def test_pairs_of_others_are_checked_as_the_input_that_they_are_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the columns of an output they were held against that format alone."""
    row = {"prompt": "what is this for", "chosen": "a", "rejected": "b", "images": [picture(0)]}
    path = str(write_parquet(tmp_path / "pairs.parquet", [row]))
    assert main(["validate", path]) == 2
    assert "as an input by --given_answers pairs" in capsys.readouterr().out
    assert main(["validate", path, "--given_answers", "pairs"]) == 0
    assert "1 rows with answers of their own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("RUN", "did you mean 'run'"),
        ("retry_failed", "did you mean 'retry-failed'"),
        ("xyzzy", "choose from run, append"),
    ],
)
def test_an_unknown_command_is_answered(
    word: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 1
    assert says in capsys.readouterr().err


def test_an_input_that_is_refused_as_a_whole_is_not_kept(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wrong file stayed among the run's inputs, and every later `shard` failed on it."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"foo": 1}\n' * 300)
    right = write_questions(tmp_path / "right.jsonl", ["what is this for"])
    words = ["run", "--pipeline_name", "echo", "--work_dir", f"{tmp_path}/w", "--dataset_path"]
    assert main([*words, str(wrong)]) == 1
    assert "max_bad_fraction" in capsys.readouterr().err
    assert main([*words, str(right)]) == 0
    assert main(["shard", f"{tmp_path}/w"]) == 0
    settings = json.loads((tmp_path / "w/run.json").read_text())["settings"]
    assert settings["dataset_path"] == [str(right)]
    kept = (tmp_path / "w/quarantine").glob("input-*")
    assert not any(path.stat().st_size for path in kept)  # an erased file may leave its name


@pytest.mark.parametrize("command", ["shard", "status", "validate"])
def test_a_name_that_is_not_utf8_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It went as far as run.json, which cannot hold it, and ended in a traceback."""
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    assert main([command, name]) == 1
    error = capsys.readouterr().err
    assert "LC_ALL=C.UTF-8" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "setting",
    [
        *("temperature=nan", "beta=inf", "min_margin=nan", "beta=0", "lease_timeout_s=0"),
        *("max_samples=-1", "max_rows=0", "retry_backoff_s=-1", "repetition_penalty=0"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(setting: str) -> None:
    """NaN was written to run.json as null, and no later command could read that run."""
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=f"{name} must be "):
        RunConfig.create({name: value})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"sample_k: 4\nsample-k: 6\n", "'sample_k' stands twice, the second time in line 2"),
        (b"rounds:\n  - {seed: 1, seed: 2}\n", "'seed' stands twice"),
        (b"a: &x\n  - *x\n", ""),
        (b"pipeline_name: caf\xe9\n", "is not UTF-8"),
        (b"a: [\n", "is not YAML"),
    ],
)
def test_a_run_file_that_says_two_things_or_none_is_refused(
    content: bytes, words: str, tmp_path: Path
) -> None:
    """Of a name that stood twice the last one was taken without a word."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    if not words:
        assert "a" in load_config_file(path)
        return
    with pytest.raises(ConfigError, match=words) as caught:
        load_config_file(path)
    assert "\n" not in str(caught.value)


def test_variables_that_no_launcher_sets_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message came as a traceback; a rank outside of its world did its work in silence."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for value, told in (("x", "must be a number"), ("2", "none of WORLD_SIZE 2")):
        monkeypatch.setenv("RANK", value)
        assert main(["run", "--demo", "--work_dir", str(tmp_path / "w")]) == 1
        assert told in capsys.readouterr().err


def test_a_tilde_that_no_shell_saw_is_the_home_folder(
    echo: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run wrote to a folder of the name `~`, and failed when it was to write its dataset."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "a,b.jsonl", ["what is this"])  # no two files
    words = "work_dir: ~/w\nimage_root: ~/\npipeline_name: echo\nsample_k: 2\nrank: 1\n"
    (tmp_path / "run.yaml").write_text(words)
    dataset = str(tmp_path / "a,b.jsonl")
    assert main(["run", "--config", "~/run.yaml", "--dataset_path", dataset]) == 0
    assert main(["status", "~/w", "--check"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a,b.jsonl", "run.yaml", "w"]
