"""Exports as JSON lines: pictures are files beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from stream_engine.outputs.formats.base import (
    EXTRAS,
)
from tests.outputs.exported import export, pair_rows


def test_ms_swift_rows_name_images_that_exist(tmp_path: Path) -> None:
    rows = pair_rows(2, num_images=2)
    (part,) = export("ms_swift_jsonl", tmp_path, rows)
    lines = [json.loads(line) for line in (tmp_path / part.name).read_text().splitlines()]
    assert part.rows == len(lines) == len(rows)
    user, assistant = lines[0]["messages"]
    assert user == {"role": "user", "content": "<image><image>What is in picture 0?"}
    assert assistant == {"role": "assistant", "content": rows[0].chosen.text}
    assert lines[0]["rejected_response"] == rows[0].rejected.text
    for line, row in zip(lines, rows):
        data = [(tmp_path / name).read_bytes() for name in line["images"]]
        assert data == [image.data for image in row.sample.images]


def test_llama_factory_rows_fit_their_dataset_info(tmp_path: Path) -> None:
    rows = pair_rows(2)
    export("llama_factory_jsonl", tmp_path, rows)
    (info,) = json.loads((tmp_path / "dataset_info.json").read_text()).values()
    assert (info["ranking"], info["formatting"]) == (True, "sharegpt")
    lines = [json.loads(li) for li in (tmp_path / info["file_name"]).read_text().splitlines()]
    assert set(info["columns"].values()) == set(lines[0]) - set(EXTRAS)
    assert lines[0]["conversations"] == [{"from": "human", "value": "<image>What is in picture 0?"}]
    assert lines[0]["chosen"] == {"from": "gpt", "value": rows[0].chosen.text}
    image = Image.open(io.BytesIO((tmp_path / lines[0]["images"][0]).read_bytes()))
    assert image.size == (8, 8)


@pytest.mark.parametrize("name", ["ms_swift_jsonl", "llama_factory_jsonl"])
def test_rows_with_images_load_after_megabytes_without(tmp_path: Path, name: str) -> None:
    """`datasets` took the empty lists of its first 10 MB for lists of nulls, and failed at the
    first row with an image."""
    datasets = pytest.importorskip("datasets")
    long = {"question": "What is it? " * 400}
    rows = [
        *pair_rows(800, num_images=0, **long),
        *pair_rows(2, num_images=2),
        *pair_rows(800, num_images=0, **long),
    ]
    (part,) = export(name, tmp_path / "d", rows)
    path = tmp_path / "d" / part.name
    assert part.bytes == path.stat().st_size > 2 * 10_500_000
    dataset = datasets.load_dataset(
        "json", data_files=str(path), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert part.rows == len(dataset) == len(rows)
    with_images = [images for images in dataset["images"][:] if images]
    assert len(with_images) == 6 and all(len(images) == 2 for images in with_images)
    assert sorted(p.name for p in (tmp_path / "d").iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["ms_swift_jsonl", "llama_factory_jsonl"])
def test_each_row_lists_its_images_where_some_have_any(tmp_path: Path, name: str) -> None:
    rows = [pair_rows(1, num_images=count)[0] for count in (0, 2, 0)]
    (part,) = export(name, tmp_path, rows)
    lines = [json.loads(line) for line in (tmp_path / part.name).read_text().splitlines()]
    assert [len(line["images"]) for line in lines] == [2, 0, 0]


@pytest.mark.parametrize("name", ["ms_swift_jsonl", "llama_factory_jsonl"])
def test_a_dataset_without_any_image_has_no_column_of_them(tmp_path: Path, name: str) -> None:
    rows = pair_rows(2, num_images=0)
    (part,) = export(name, tmp_path, rows)
    lines = [json.loads(line) for line in (tmp_path / part.name).read_text().splitlines()]
    assert part.rows == len(lines) == len(rows)
    assert not any("images" in line for line in lines)
    if name == "llama_factory_jsonl":
        (info,) = json.loads((tmp_path / "dataset_info.json").read_text()).values()
        assert set(info["columns"].values()) == set(lines[0]) - set(EXTRAS)
