"""The dataset card: what loads the folder, and what a reader learns from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stream_engine import __version__
from stream_engine.config import RunConfig
from stream_engine.outputs.columns import column_rows, yaml_features
from stream_engine.outputs.formats import FORMATS
from stream_engine.outputs.formats.base import ParquetFiles
from stream_engine.outputs.made_by import command_line
from stream_engine.outputs.parquet import arrow_schema
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


def test_the_card_is_what_the_hub_reads(run_dir: RunDir) -> None:
    from huggingface_hub import DatasetCard

    run_merge(
        run_dir, format=("trl",), license="cc-by-4.0", language=("en", "zh"), pretty_name="Shapes"
    )
    card = DatasetCard.load(run_dir.dataset_dir / "README.md")
    assert (card.data.license, card.data.language) == ("cc-by-4.0", ["en", "zh"])
    assert card.data.pretty_name == "Shapes" and "# Shapes" in card.text
    assert {"trl", "rlaif", "dpo", "image"} <= set(card.data.tags)
    assert "```bibtex" in card.text
    assert "stream-engine run" in card.text and f"stream-engine-dpo {__version__}" in card.text
    assert (run_dir.dataset_dir / "assets/example.jpg").stat().st_size > 0


@pytest.mark.parametrize(
    "name", [name for name, kind in FORMATS.items() if issubclass(kind, ParquetFiles)]
)
def test_the_cards_features_are_those_that_datasets_itself_would_write(name: str) -> None:
    datasets = pytest.importorskip("datasets")
    kind = FORMATS[name]
    assert issubclass(kind, ParquetFiles)
    features = kind.features
    theirs = datasets.Features.from_arrow_schema(arrow_schema(features))
    assert yaml_features(features) == theirs._to_yaml_list()
    named = {row[0].strip("`") for row in column_rows(kind, name)}
    assert named == set(features)


def test_the_cards_sizes_are_those_of_the_splits(run_dir: RunDir, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    report = run_merge(run_dir, format=("llama_factory",), test_fraction=0.4)
    loaded = datasets.load_dataset(report.dataset, cache_dir=str(tmp_path / "cache"))
    builder = datasets.load_dataset_builder(report.dataset, cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {
        name: split.num_examples for name, split in builder.info.splits.items()
    }
    assert set(loaded) == {"train", "test"}
    assert not set(loaded["train"]["idx"][:]) & set(loaded["test"]["idx"][:])


def test_the_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    cache = f"{tmp_path}/hub/models--acme--vlm-7b/snapshots/0123456789abcdef"
    config = RunConfig.create(
        {
            "instruct_model_path": cache,
            "reward_model_path": f"{tmp_path}/judge,{tmp_path}/split",
            "dataset_path": (f"{tmp_path}/in.parquet", "hf://datasets/acme/questions:train"),
            "work_dir": str(tmp_path / "secret"),
            "image_root": str(tmp_path / "pictures"),
            "rank": 2,
        }
    )
    line = command_line(config)
    assert str(tmp_path) not in line and "secret" not in line
    assert "--instruct_model_path acme/vlm-7b@0123456789ab" in line
    assert "--reward_model_path judge,split" in line
    assert "--dataset_path in.parquet,acme/questions:train" in line
    assert "--rank 2" in line


def test_each_card_names_its_own_format_whatever_others_are_asked_for(run_dir: RunDir) -> None:
    """A card told the formats of the merge that made it, when others were asked for since."""

    def formats_told(folder: str) -> list[str]:
        return re.findall(r"--format (\S+)", (run_dir.root / folder / "README.md").read_text())

    for formats in (("trl",), ("trl", "ms_swift_jsonl"), ("trl", "llama_factory")):
        run_merge(run_dir, format=formats)
        assert formats_told("dataset") == ["trl"]
    assert formats_told("dataset_ms_swift_jsonl") == ["ms_swift_jsonl"]
    assert formats_told("dataset_llama_factory") == ["llama_factory"]


def test_an_example_cannot_end_its_block(tmp_path: Path) -> None:
    """Whatever a question spells, it is shown as text."""
    run_dir = RunDir(tmp_path)
    hostile = "```\n<script>x</script>\n````\n---\n# A heading\x1b[31m"
    write_run(run_dir, [synthetic_sample(0, question=hostile)])
    run_merge(run_dir, format=("trl",))
    card = (run_dir.dataset_dir / "README.md").read_text()
    assert "`````text\n```\n<script>x</script>\n````\n---\n# A heading\\x1b[31m\n`````" in card
