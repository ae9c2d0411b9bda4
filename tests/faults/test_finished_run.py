"""A finished run repeated does nothing: no model is loaded, no file is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stream_engine.cli.main import main
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import change, read_run_file
from tests.conftest import DEMO_FLAGS, ROOT, file_states


def test_a_run_without_failures_prints_no_warning(demo_run: Path) -> None:
    """Each printed the library's FutureWarning that `past_key_values` is deprecated."""
    assert "warning" not in (demo_run.parent / "log").read_text().lower()


def test_a_finished_run_repeated_does_not_even_import_torch(
    demo_run: Path, demo_questions: Path
) -> None:
    folders = ("shards", "results", "dataset")
    before = {folder: file_states(demo_run / folder) for folder in folders}
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", demo_run]
    code = f"""
import sys
from stream_engine.cli.main import main
status = main({[str(word) for word in words]!r})
sys.exit(77 if "torch" in sys.modules else status)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to do" in done.stdout
    assert {folder: file_states(demo_run / folder) for folder in folders} == before


def test_pairs_are_built_where_the_models_are_not(
    demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge on another machine asked for checkpoints that it never opens."""
    work_dir = tmp_path / "run"
    shutil.copytree(demo_run, work_dir)

    def moved(run_file: Any) -> Any:
        for name in ("instruct", "reward"):
            run_file.settings[f"{name}_model_path"] = f"/local/disk/{name}"
        return run_file

    before = read_run_file(RunDir(work_dir)).stages
    change(RunDir(work_dir), lambda _: moved(read_run_file(RunDir(work_dir))))
    assert main(["merge", str(work_dir), "--min_margin", "0.05"]) == 0
    assert "pairs" in capsys.readouterr().out
    assert main(["retry-failed", str(work_dir), "--requeue_only"]) == 0
    assert read_run_file(RunDir(work_dir)).stages == before
    assert main(["merge", str(work_dir), "--instruct_model_path", "/another"]) == 1
    assert "/another is not a directory" in capsys.readouterr().err
    assert main(["work", str(work_dir)]) == 1
    assert "/local/disk/instruct is not a directory" in capsys.readouterr().err
