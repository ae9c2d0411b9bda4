"""The dataset card: what loads the folder, and what a reader learns from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stream_engine.run_dir.paths import RunDir
from tests.synthetic import run_merge, synthetic_sample, write_example_run, write_run


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


@pytest.mark.parametrize("format", ["rlaifv", "trl", "ms_swift"])
def test_every_dataset_loads_its_own_rows_through_one_cache(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run's folder, and the first one merged again, gave the first one's cached rows:
    the cards were the same to `load_dataset`, which hashes the pattern of the data files only."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "default"))

    def idxs(folder: str) -> list[list[str]]:
        column = "images" if format == "ms_swift" else "idx"
        given = datasets.load_dataset(folder, cache_dir=str(tmp_path / "given"))["train"]
        by_default = datasets.load_dataset(folder)["train"]
        return [given[column][:], by_default[column][:]]

    first = write_example_run(tmp_path / "first")
    other = RunDir(tmp_path / "other")
    write_run(other, [synthetic_sample(i) for i in range(100, 104)])
    of_first = idxs(run_merge(first, format=(format,)).dataset)
    of_other = idxs(run_merge(other, format=(format,)).dataset)
    merged_again = idxs(run_merge(first, format=(format,), rank=1).dataset)
    assert len(of_first[0]) > len(merged_again[0]) > 0
    for one in (of_first, of_other, merged_again):
        assert one[0] == one[1]
    assert str(of_first[0]) != str(of_other[0])


def test_the_card_shows_the_sampling_that_the_engine_resolved(run_dir: RunDir) -> None:
    engines = {"instruct": {"sampling": {"temperature": 0.7, "top_p": 0.95}}}
    run_dir.run_json.write_text(json.dumps({"engines": engines}))
    run_merge(run_dir, seed=7)
    card = (run_dir.dataset_dir / "README.md").read_text()
    assert "| top_p | 0.95 |" in card
    assert "| seed | 7 |" in card
