"""The prompt ids that ms-swift and LLaMA-Factory make of exported rows are those that were asked.

Each runs in an environment of its own, which a variable names; without it the test is skipped:

    python -m venv swift && swift/bin/pip install ms-swift qwen_vl_utils   MS_SWIFT_PYTHON=swift/bin/python
    python -m venv lf && lf/bin/pip install llamafactory              LLAMA_FACTORY_PYTHON=lf/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from stream_engine.config import ModelConfig
from stream_engine.models import load_model
from tests.outputs.asked import QUESTIONS, ask_all, export_all
from tests.outputs.qwen_checkpoint import write_qwen

TRAINERS = Path(__file__).parent / "trainers"
PYTHONS = {"ms_swift": "MS_SWIFT_PYTHON", "llama_factory": "LLAMA_FACTORY_PYTHON"}


@pytest.mark.parametrize("name", PYTHONS)
def test_the_trainers_template_makes_the_prompt_that_was_asked(name: str, tmp_path: Path) -> None:
    python = os.environ.get(PYTHONS[name])
    if not python:
        pytest.skip(f"{PYTHONS[name]} names no interpreter with {name}")
    model = load_model(write_qwen(tmp_path / "model"), ModelConfig(device="cpu"))
    asked = ask_all(model)
    export_all(asked, name, tmp_path / "dataset")
    done = subprocess.run(
        [python, TRAINERS / f"{name}_ids.py", tmp_path / "model", tmp_path / "dataset"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("IDS ")]
    assert len(found) == len(QUESTIONS), done.stderr[-2000:]
    # rows without pictures may come after others
    assert sorted(found) == sorted(question.ids for question in asked)
