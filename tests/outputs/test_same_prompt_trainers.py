"""The prompt ids that other trainers' own code makes of exported rows are those that were asked.

Each is named by a variable; without it its test is skipped:

    RLAIFV_CHECKOUT          git clone https://github.com/RLHF-V/RLAIF-V
    MS_SWIFT_PYTHON          python -m venv E && E/bin/pip install ms-swift qwen_vl_utils
    LLAMA_FACTORY_PYTHON     python -m venv E && E/bin/pip install llamafactory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stream_engine.config import ModelConfig
from stream_engine.models import load_model
from stream_engine.models.base import IMAGE_SLOT
from stream_engine.outputs.formats.rlaifv import RlaifvExport
from stream_engine.outputs.parquet import write_empty
from tests.conftest import ROOT
from tests.models.conftest import GOLDEN
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


def rlaifv_checkout() -> str:
    checkout = os.environ.get("RLAIFV_CHECKOUT")
    if not checkout:
        pytest.skip("RLAIFV_CHECKOUT names no clone of RLHF-V/RLAIF-V")
    return checkout


def rlaifv_ids(checkout: str, checkpoint: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What its dataset class makes of a folder."""
    return subprocess.run(
        [sys.executable, TRAINERS / "rlaifv_ids.py", checkout, checkpoint, folder],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )


def test_rlaifvs_dataset_class_makes_the_prompt_that_was_asked(tmp_path: Path) -> None:
    """For LLaVA-1.5; it reads rows of one picture. A mark inside the text is not asked there, and
    not exported."""
    checkout = rlaifv_checkout()
    checkpoint = GOLDEN / "llava15" / "checkpoint"
    model = load_model(checkpoint, ModelConfig(device="cpu"))
    asked = [question for question in ask_all(model) if len(question.sample.images) == 1]
    export_all(asked, "rlaifv", tmp_path)
    done = rlaifv_ids(checkout, checkpoint, tmp_path)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("IDS ")]
    found = {name: json.loads(ids) for _, name, ids in lines}
    assert found == {question.name: with_one_slot(question.ids) for question in asked}, done.stderr
    assert {"one", "spaces", "inline", "foreign"} == set(found)


def with_one_slot(ids: list[int]) -> list[int]:
    """Prompt ids with one slot for the picture, as its trainer has them before the model."""
    return [i for run, all_of in groupby(ids) for i in ([run] if run == IMAGE_SLOT else all_of)]


@pytest.mark.parametrize(
    ("lost", "says"),
    [("column", "KeyError: 'logps'"), ("file", "`reference_model` is mandatory")],
)
def test_rlaifvs_dataset_class_needs_the_stored_log_probs(
    lost: str, says: str, tmp_path: Path
) -> None:
    """A card's advice to drop them was a trap: see what it says now."""
    checkout = rlaifv_checkout()
    checkpoint = GOLDEN / "llava15" / "checkpoint"
    asked = ask_all(load_model(checkpoint, ModelConfig(device="cpu")))[:1]
    export_all(asked, "rlaifv", tmp_path)
    if lost == "file":
        (tmp_path / RlaifvExport.marker).unlink()
    else:
        (part,) = tmp_path.glob("train-*-of-*.parquet")
        rows = pq.read_table(part).drop_columns(["logps"]).replace_schema_metadata(None)
        pq.write_table(rows, part)
        write_empty(tmp_path / RlaifvExport.marker, rows.schema)
    done = rlaifv_ids(checkout, checkpoint, tmp_path)
    assert done.returncode != 0 and says in done.stderr
