"""A finished run repeated does nothing: no model is loaded, no file is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
