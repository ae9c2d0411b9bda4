"""The command line: names, files, refusals, exit statuses. Every user error is one line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from stream_engine.cli.command import LineParser
from stream_engine.cli.flags import add_settings
from stream_engine.cli.main import COMMANDS, command_of, main
from stream_engine.store.leases import list_leases
from tests import echo_pipeline
from tests.conftest import ROOT, rows_file, stream_engine, write_questions


def test_the_steps_alone_make_a_run(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_questions(tmp_path / "q.jsonl", [f"what is {i} for" for i in range(6)])
    run_dir = str(tmp_path / "w")
    flags = f"--pipeline_name echo --sample_k 4 --rank 1 --dataset_path {dataset}".split()
    assert main(["shard", run_dir, *flags]) == 0
    assert main(["status", run_dir, "--check"]) == 1  # work is left
    assert main(["merge", run_dir]) == 1  # it said that all is done
    assert main(["work", run_dir]) == 0
    assert not (tmp_path / "w/dataset").exists()
    assert main(["status", run_dir, "--check"]) == 1  # its dataset is not written
    assert main(["merge", run_dir, "--echo_twice"]) == 0  # an option of the run's own pipeline
    assert main(["status", run_dir, "--check"]) == 0
    rows = rows_file(tmp_path / "w/dataset")
    left = rows.with_name("train-00000-of-00001-0123abcd.parquet")
    left.write_text("of a publication that was ended")
    capsys.readouterr()
    assert main(["status", run_dir, "--check", "--json"]) == 0  # the dataset stands as it should
    (told,) = json.loads(capsys.readouterr().out)["left_behind"]
    assert told.startswith(f"dataset: {left}: is of another publication")
    assert main(["status", run_dir, "--check"]) == 0 and told in capsys.readouterr().out
    left.unlink()
    rows.write_bytes(rows.read_bytes()[:100])
    capsys.readouterr()
    assert main(["status", run_dir, "--check"]) == 1
    assert f"dataset: {rows}: 100 bytes" in capsys.readouterr().out
    (tmp_path / "w/run.json").unlink()
    (tmp_path / "w/results/rewards/0000007.msgpack").write_text("no shard's")
    assert main(["run", "--work_dir", run_dir, *flags]) == 0
    dataset.unlink()  # all of it was read
    assert main(["run", "--work_dir", run_dir, *flags]) == 0
    more = write_questions(tmp_path / "more.jsonl", ["what else"], first_id=50)
    assert main(["append", run_dir, "--dataset_path", str(more)]) == 0
    assert main(["export", run_dir, "--format", "trl,ms_swift_jsonl"]) == 0
    capsys.readouterr()
    assert main(["status", run_dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["done"] == 7
    assert rows_file(tmp_path / "w/dataset_ms_swift_jsonl").stat().st_size > 0


def test_export_lists_only_what_shapes_an_export(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert flags == {
        *("--help", "--work_dir", "--output_dir", "--format", "--max_part_bytes", "--out"),
        *("--test_fraction", "--round"),
    }


def test_no_id_or_path_breaks_a_line_or_an_encoding(tmp_path: Path) -> None:
    """An id that stdout's encoding lacks ended `validate` in a traceback; an escape in one could
    have cleared the terminal."""
    folder = tmp_path / "fol\u00e9der\x1b[2J"
    folder.mkdir()
    dataset = write_questions(folder / "q.jsonl", ["what is it for"])
    first = json.loads(dataset.read_text())
    rows = [first | {"question_id": "\u56fe\n\x1b[31m", "question": q} for q in ("what", "who")]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in (["validate", dataset], ["run", "--demo", "--dataset_path", dataset]):
        words += ["--work_dir", tmp_path / "w", "--sample_k=4", "--rank=1", "--max_new_tokens=4"]
        done = stream_engine(*words, PYTHONIOENCODING="ascii")
        assert done.returncode == 2, done.stderr
        assert r"\u56fe\n\x1b[31m" in done.stdout
        assert "conflicting_id" in done.stdout
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stdout.isascii()


def test_a_trials_limit_is_of_its_own_input_alone(
    echo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`append` read as many samples of the new input as the trial had read of the first, and said
    nothing of the rest."""

    def total() -> int:
        capsys.readouterr()
        assert main(["status", run_dir, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["samples"]["total"]

    first = write_questions(tmp_path / "a.jsonl", [f"what is {i} for" for i in range(6)])
    more = write_questions(tmp_path / "b.jsonl", [f"who is {i}" for i in range(7)], first_id=50)
    few = write_questions(tmp_path / "c.jsonl", [f"why is {i}" for i in range(7)], first_id=90)
    run_dir = f"{tmp_path}/w"
    words = f"run --pipeline_name echo --work_dir {run_dir} --dataset_path {first}".split()
    assert main([*words, "--max_samples=2"]) == 0
    assert main(["append", run_dir, "--dataset_path", str(more)]) == 0
    assert total() == 2 + 7
    assert main(["append", run_dir, "--dataset_path", str(few), "--max_samples=3"]) == 0
    assert total() == 2 + 7 + 3
    assert main(["retry-failed", run_dir]) == 0
    assert main([*words, "--max_samples=2"]) == 0
    assert total() == 2 + 7 + 3, "what a limit left out is not read by the way"
    assert main(words) == 0
    assert total() == 6 + 7 + 3


def test_failures_end_with_status_2_unless_they_are_ok(echo: None, tmp_path: Path) -> None:
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this", "aside with that"])
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    assert main(words) == 2
    assert main([*words, "--failures_ok"]) == 0


@pytest.mark.parametrize(
    ("alike", "reason"),
    [
        pytest.param(False, "all 9 candidates were dropped, 9 as needs_one_image", id="dropped"),
        pytest.param(True, "none has two answers that make one", id="no-candidate"),
    ],
)
def test_a_run_without_a_pair_says_so_and_ends_with_status_2(
    alike: bool,
    reason: str,
    echo: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that wrote no pair ended with status 0, and its counts had no line for pairs."""
    dataset = tmp_path / "q.jsonl"
    rows = [{"question": f"what is {i} for"} for i in range(9)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if alike:
        answer = echo_pipeline.answer
        one = {"text": "just this"}
        monkeypatch.setattr(
            echo_pipeline, "answer", lambda s, j: msgspec.structs.replace(answer(s, j), **one)
        )
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    words += ["--rank=1", "--sample_k=4", "--text_only=allow"]
    assert main(words) == 2
    out = capsys.readouterr().out
    assert "pairs:   " in out and " = 0 written + " in out
    assert f"NO PAIRS: no pair was written of 9 scored samples: {reason}" in out
    assert main(["status", f"{tmp_path}/w", "--check"]) == 2
    assert main([*words, "--failures_ok"]) == 0


@pytest.mark.parametrize(
    ("questions", "correct", "opening"),
    [
        pytest.param(["", ""], True, "no sample to work on: every record", id="rejected"),
        pytest.param(["what is this", "aside with it"], False, None, id="set-aside"),
        pytest.param(["boom"], False, None, id="failed-shard"),
        pytest.param(["", "what is this", "aside with it"], True, None, id="both"),
    ],
)
def test_the_remedy_is_one_that_can_help(
    questions: list[str],
    correct: bool,
    opening: str | None,
    echo: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rejected records were to be tried again as they were, and a run of nothing else was called
    up to date."""
    dataset = write_questions(tmp_path / "q.jsonl", questions)
    words = f"run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}".split()
    words += ["--retry_backoff_s=0"]
    for opening_now in (opening, opening or "nothing to do"):
        assert main(words) == 2
        out = capsys.readouterr().out
        assert out.startswith(opening_now or "samples: ")
        assert "up to date" not in out
        assert f"to try these again: stream-engine retry-failed {tmp_path}/w" in out
        seen = re.search(r"correct the input \(see .*/quarantine/input-\w+-\w+\.jsonl", out)
        assert bool(seen) == correct


def test_deepspeed_puts_its_flag_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "--version"]) == 0
    assert "stream-engine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["status", "."],
        ["plan", "--demo", "--device", "cpu"],
    ],
)
def test_light_commands_do_not_import_torch(words: list[str]) -> None:
    code = f"""
import sys
from stream_engine.cli.main import main
try:
    main({words!r})
except SystemExit:
    pass
sys.exit(77 if "torch" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("words", [["--help"], ["status", "."], ["inspect", "1", "."]])
def test_what_only_looks_loads_no_large_package(words: list[str]) -> None:
    """`--help` took half a second: it loaded what reads inputs, writes parquet and merges."""
    code = f"""
import sys
from stream_engine.cli.main import main
main({words!r})
large = ("torch", "numpy", "pyarrow", "fsspec", "PIL", "webdataset", "stream_engine.pipelines")
print([name for name in large if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_both_entry_points_are_the_same_command() -> None:
    module = stream_engine("--version")
    script = subprocess.run(
        [str(Path(sys.executable).with_name("stream-engine")), "--version"],
        capture_output=True,
        text=True,
    )
    assert module.stdout == script.stdout != ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_worker_quickly_and_frees_its_lease(tmp_path: Path, number: int) -> None:
    """In a process of its own: a shard that sleeps, and a signal while it does."""
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this"])
    code = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
signal.signal({int(number)}, signal.SIG_DFL)  # as nohup, say, ignores one of them
from stream_engine import pipelines
from tests import echo_pipeline
pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
def sleep(question, num_calls):
    threading.Timer(0.2, os.kill, (os.getpid(), {int(number)})).start()
    time.sleep(30)
echo_pipeline.misbehave = sleep
from stream_engine.cli.main import main
words = "run --pipeline_name echo --work_dir {tmp_path}/w --dataset_path {dataset}"
sys.exit(main(words.split()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.returncode == 128 + number, done.stderr
    assert not list_leases(tmp_path / "w/leases")
    assert not list((tmp_path / "w/failures").glob("*"))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_flag_of_every_command_says_what_it_does(name: str) -> None:
    parser = LineParser(prog=name)
    command = command_of(name)
    command.arguments(parser)
    if command.takes_settings:
        add_settings(parser)
    silent = [a.option_strings or a.dest for a in parser._actions if not (a.help or "").strip()]
    assert not silent
