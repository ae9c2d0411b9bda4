import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from stream_engine.records import sample_key
from stream_engine.run_dir.shards import write_shard
from tests.inputs.formats import read
from tests.samples import (
    Row,
    make_row,
    picture,
    write_jsonl,
    write_parquet,
)


def test_images_may_be_bare_bytes_or_lists(tmp_path: Path):
    rows = [{"question": "?", "image": picture(1)}]
    assert read(write_parquet(tmp_path / "a.parquet", rows))[0].images[0].data == picture(1)
    rows = [{"question": "?", "image": [picture(1), picture(2)]}]
    assert len(read(write_parquet(tmp_path / "b.parquet", rows))[0].images) == 2


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        pytest.param(np.array([7, 2**53 + 1]), ["7", "9007199254740993"], id="integers"),
        pytest.param(np.array([7.0, np.nan]), ["7", None], id="floats-with-a-gap"),
        pytest.param(np.array([7, 8], dtype=np.uint8), ["7", "8"], id="small-integers"),
        pytest.param(np.array(["x-1", "007"]), ["x-1", "007"], id="text"),
        pytest.param(pa.array(["", None]), [None, None], id="missing"),
    ],
)
def test_ids_become_strings(tmp_path: Path, column, expected):
    table = pa.table({"idx": pa.array(column), "question": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    samples = read(tmp_path / "a.parquet")
    keys = [sample_key("", question, ()) for question in ("a", "b")]
    assert [sample.idx for sample in samples] == [
        key if idx is None else idx for idx, key in zip(expected, keys)
    ]


def test_without_an_id_the_key_is_the_id(tmp_path: Path):
    (sample,) = read(write_jsonl(tmp_path / "a.jsonl", [{"question": "Why?"}]))
    assert sample.idx == sample.key == sample_key("", "Why?", ())


def test_question_id_stands_in_for_idx(tmp_path: Path):
    rows = [{"question": "a", "question_id": 5}, {"question": "b", "question_id": 6, "idx": "x"}]
    assert [s.idx for s in read(write_jsonl(tmp_path / "a.jsonl", rows))] == ["5", "x"]


def test_other_columns_are_carried_as_text(tmp_path: Path):
    row = {
        "question": "?",
        "ds_name": "d",
        "origin_dataset": "o",
        "origin_split": {"model": "m", "type": "détail"},
        "metainfos": '{"a": 1}',
        "ds_question_id": 9,
        "unknown": "ignored",
    }
    (sample,) = read(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert (sample.ds_name, sample.origin_dataset) == ("d", "o")
    assert sample.origin_split == '{"model": "m", "type": "détail"}'
    assert json.loads(sample.metainfos) == {"a": 1, "ds_question_id": 9}

    text = {**row, "origin_split": '{"model": "m"}', "metainfos": "free text"}
    (sample,) = read(write_jsonl(tmp_path / "b.jsonl", [text]))
    assert sample.origin_split == '{"model": "m"}'
    assert json.loads(sample.metainfos) == {"metainfos": "free text", "ds_question_id": 9}


def test_an_image_path_is_relative_to_its_file_or_absolute(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.png").write_bytes(picture(1))
    rows: list[Row | str] = [
        {"question": "1", "image_path": "a.png"},
        {"question": "2", "image_path": str(tmp_path / "deep/a.png"), "image": ""},
        {"question": "3", "image": {"bytes": picture(2)}, "image_path": "elsewhere.png"},
    ]
    samples = read(write_jsonl(tmp_path / "deep/a.jsonl", rows))
    assert [s.images[0].data for s in samples] == [picture(1), picture(1), picture(2)]
    assert [s.image_path for s in samples] == [row["image_path"] for row in rows]
    assert samples[2].images[0].path == "elsewhere.png"


def test_a_parquet_image_with_a_path_alone_is_read_from_it(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"question": "1", "image": {"bytes": None, "path": "a.png"}}]
    assert read(write_parquet(tmp_path / "a.parquet", rows))[0].images[0].data == picture(1)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"image": "a.png"}, id="image"),
        pytest.param({"image": "sub/../a.png"}, id="image-in-a-folder"),
        pytest.param({"image": "sub/picture7"}, id="no-suffix"),
        pytest.param({"image": f"{'sub/../' * 40}a.png"}, id="longer-than-rlaifv-allows"),
        pytest.param({"images": ["a.png"]}, id="images"),
        pytest.param({"images": [{"path": "a.png"}]}, id="images-of-dicts"),
        pytest.param({"image": {"bytes": "", "path": "a.png"}}, id="empty-bytes"),
        pytest.param({"metainfos": {"image_path": "a.png"}}, id="metainfos"),
        pytest.param({"metainfos": '{"image_path": "a.png"}', "image": ""}, id="metainfos-text"),
        pytest.param({"image_path": "", "metainfos": {"image_path": "a.png"}}, id="both"),
    ],
)
def test_a_path_in_an_images_place_is_read_through_the_fence(tmp_path: Path, row: Row):
    """LLaVA's own layout, `"image": "a.jpg"`, was taken for base64, and every row rejected."""
    (tmp_path / "rows/sub").mkdir(parents=True)
    for name in ("rows/a.png", "rows/sub/picture7"):
        (tmp_path / name).write_bytes(picture(1))
    path = write_jsonl(tmp_path / "rows/a.jsonl", [{"question": "?", **row}])
    (sample,) = read(path)
    assert [image.data for image in sample.images] == [picture(1)]
    (tmp_path / "elsewhere").mkdir()
    (fenced,) = read(path, image_root=str(tmp_path / "elsewhere"))
    assert fenced.reason == "path_outside_root"


@pytest.mark.parametrize(
    "row",
    [
        {"image": "gone.jpg"},
        {"image": "coco/train2017/000000033471"},
        {"images": ["a.png", "gone.jpg"]},
        {"image": {"bytes": "", "path": "gone.jpg"}},
        {"image": "", "image_path": "gone.jpg"},
        {"metainfos": {"image_path": "gone.jpg"}},
        {"image": "coco\\gone.jpg"},
    ],
)
def test_a_picture_that_is_named_and_not_found_is_no_question_without_one(tmp_path, row: Row):
    (tmp_path / "a.png").write_bytes(picture(1))
    (failure,) = read(write_jsonl(tmp_path / "a.jsonl", [{"question": "?", **row}]))
    assert failure.reason == "missing_image_file"


def test_base64_with_slashes_is_no_path(tmp_path: Path):
    """The smallest pictures are as short as paths; what is longer than a path is base64."""
    dot = "R0lGODlhAQABAIAAAP///////yH5BAEAAAEALAAAAAABAAEAAAICTAEAOw=="
    assert "/" in dot and len(dot) < 100
    rows: list[Row | str] = [
        {"question": "1", "image": dot},
        {"question": "2", "image": f"data:image/gif;base64,{dot}"},
        {"question": "3", "image": f"*{'ab/d' * 2000}"},
    ]
    first, second, failure = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert first.images == second.images and first.images
    assert failure.reason == "bad_base64"


@pytest.mark.parametrize(
    "row",
    [
        {"image": {"bytes": "", "path": ""}},
        {"image": {"bytes": None, "path": None}},
        {"images": []},
        {"images": [{"bytes": "", "path": ""}, None]},
        {"image": "", "image_path": "", "metainfos": {"image_path": ""}},
        {"metainfos": {"other": 1}},
        {"metainfos": "image_path: none"},
    ],
)
def test_empty_stand_ins_for_an_image_are_no_image(tmp_path: Path, row: Row):
    (sample,) = read(write_jsonl(tmp_path / "a.jsonl", [{"question": "?", **row}]))
    assert sample.images == ()


def test_an_empty_place_among_images_is_rejected(tmp_path: Path):
    images = [{"bytes": picture(1), "path": "a.png"}, {"bytes": None, "path": None}]
    rows = [{"question": "?", "images": images}]
    (failure,) = read(write_parquet(tmp_path / "a.parquet", rows))
    assert failure.reason == "unknown_image_form"


def test_a_sideways_picture_is_read_upright_and_an_upright_one_as_it_is(tmp_path: Path):
    """The engine, and every trainer that loads the dataset, must see the same pixels."""
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sideways = io.BytesIO()
    image.save(sideways, "PNG", exif=exif)
    rows = [{"question": "1", "image": {"bytes": sideways.getvalue(), "path": "a.png"}}]
    (sample,) = read(write_parquet(tmp_path / "a.parquet", [*rows]))
    (stored,) = sample.images
    assert Image.open(io.BytesIO(stored.data)).size == (4, 8)
    assert stored.path == "a.png"
    assert sample.key == sample_key("", "1", sample.images)
    write_shard(tmp_path / "000000.tar", 0, [sample])
    (again,) = read(tmp_path / "000000.tar")
    assert (again.key, again.images[0].data) == (sample.key, stored.data)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"metainfos": "[" * 100_000, "ds_question_id": "1"}, id="deep-text"),
        pytest.param('{"question": "?", "metainfos": ' + "[" * 100_000 + "}", id="deep-json"),
        pytest.param('{"question": "?", "n": ' + "9" * 5000 + "}", id="huge-integer"),
        pytest.param('{"question": "?", "ds_name": "\\ud800"}', id="half-a-surrogate"),
    ],
)
def test_no_row_stops_the_others(tmp_path: Path, row):
    bad = {"question": "?", **row} if isinstance(row, dict) else row
    first, failure, last = read(write_jsonl(tmp_path / "a.jsonl", [make_row(1), bad, make_row(2)]))
    assert (first.idx, last.idx) == ("1", "2")
    assert failure.reason in ("invalid_text", "malformed_json")


def test_ten_thousand_columns_are_passed_over(tmp_path: Path):
    row = make_row(1) | {f"column {i}": i for i in range(10_000)}
    (sample,) = read(write_parquet(tmp_path / "a.parquet", [row]))
    assert sample.idx == "1"
