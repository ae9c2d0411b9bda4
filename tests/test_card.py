"""The dataset card: what loads the folder, and what a reader learns from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stream_engine.storage.run_dir import RunDir
from tests.synthetic import run_merge, write_example_run


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return write_example_run(tmp_path / "run")


def test_the_card_makes_the_folder_load_by_its_name(run_dir: RunDir, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    report = run_merge(run_dir, format=("rlaifv", "trl"), max_part_bytes=20_000)
    assert len(report.parts) > 1
    for name in ("rlaifv", "trl"):
        one = report.formats[name]
        loaded = datasets.load_dataset(one.folder, cache_dir=str(tmp_path / "cache"))
        assert list(loaded) == ["train"]
        assert len(loaded["train"]) == one.written
    card = (run_dir.dataset_dir / "README.md").read_text()
    assert f"| ... written | {report.written} |" in card


def test_the_card_shows_the_sampling_that_the_engine_resolved(run_dir: RunDir) -> None:
    engines = {"instruct": {"sampling": {"temperature": 0.7, "top_p": 0.95}}}
    run_dir.run_json.write_text(json.dumps({"engines": engines}))
    run_merge(run_dir, seed=7)
    card = (run_dir.dataset_dir / "README.md").read_text()
    assert "| top_p | 0.95 |" in card
    assert "| seed | 7 |" in card
