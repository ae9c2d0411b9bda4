import errno
import io
import json
import os
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from stream_engine.errors import ConfigError
from stream_engine.inputs.readers import FORMAT_READERS, read_rows, read_samples
from stream_engine.inputs.sources import list_inputs
from stream_engine.records import Failure, Sample, sample_key
from stream_engine.run_dir.shards import write_shard
from tests.samples import (
    Row,
    input_config,
    make_row,
    make_sample,
    picture,
    write_jsonl,
    write_parquet,
)


def read(source: str | Path, **settings) -> list[Sample | Failure]:
    return list(read_samples(str(source), input_config(**settings)))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(path: Path, rows: list[Row]) -> Path:
    members = {}
    for i, row in enumerate(rows):
        stored = {name: value for name, value in row.items() if name != "image"}
        members[f"{i:05d}.json"] = json.dumps(stored).encode()
        if row.get("image"):
            members[f"{i:05d}.png"] = row["image"]["bytes"]
    return write_tar(path, members)


def write_saved_dataset(path: Path, rows: list[Row]) -> Path:
    import datasets

    dataset = datasets.Dataset.from_list(rows)
    dataset.cast_column("image", datasets.Image()).save_to_disk(str(path), num_shards=2)
    return path


def write_feather(path: Path, rows: list[Row]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


WRITERS = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.tar": write_webdataset,
    "a.tar.gz": write_webdataset,
    "saved": write_saved_dataset,
    "a.arrow": write_feather,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_samples(tmp_path: Path, name: str):
    source = WRITERS[name](tmp_path / name, [make_row(i) for i in range(40)])
    samples = read(source)
    assert [sample.idx for sample in samples] == [str(i) for i in range(40)]
    assert {sample.ds_name for sample in samples} == {"pictures"}
    for i, sample in enumerate(samples):
        assert sample.question == f"What is in picture {i}?"
        assert [image.data for image in sample.images] == [picture(i)]
        assert sample.key == sample_key(str(i), sample.question, sample.images)


@pytest.mark.parametrize("name", WRITERS)
def test_columns_that_no_reader_knows_are_named(tmp_path: Path, name: str):
    """A misnamed image column was passed over: the rows were read, without their pictures."""
    rows = [make_row(i) | {"image_file": f"{i}.png", "ds_question_id": i} for i in range(20)]
    path = WRITERS[name](tmp_path / name, rows)
    unread: dict[str, None] = {}
    assert len(list(read_rows(str(path), input_config(), unread=unread))) == 20
    assert list(unread) == ["image_file"]


def test_a_runs_own_shards_hold_no_unread_columns(tmp_path: Path):
    write_shard(tmp_path / "000000.tar", 0, [make_sample(1)])
    unread: dict[str, None] = {}
    assert len(list(read_rows(str(tmp_path / "000000.tar"), input_config(), unread=unread))) == 1
    assert not unread


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "saved"])
def test_questions_without_an_image_are_samples(tmp_path: Path, name: str):
    rows = [{"idx": 1, "question": "Why?"}, {"idx": 2, "question": "How?", "image": None}]
    assert [sample.images for sample in read(WRITERS[name](tmp_path / name, rows))] == [(), ()]


def test_samples_of_our_own_shards_come_back_as_they_were(tmp_path: Path):
    samples = [make_sample(i, num_images=i % 3) for i in range(5)]
    samples.append(read(write_jsonl(tmp_path / "a.jsonl", [{"question": "no id"}]))[0])
    write_shard(tmp_path / "000000.tar", 0, samples)
    again = read(tmp_path / "000000.tar")
    assert [sample.key for sample in again] == [sample.key for sample in samples]
    assert [sample.idx for sample in again] == [sample.idx for sample in samples]
    assert [sample.metainfos for sample in again] == ['{"number": 1}'] * 5 + [""]


def test_several_images_keep_their_order(tmp_path: Path):
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(12)]
    row = {"idx": 1, "question": "?", "images": images}
    wanted = [image["bytes"] for image in images]

    (from_parquet,) = read(write_parquet(tmp_path / "a.parquet", [row]))
    assert [image.data for image in from_parquet.images] == wanted
    assert from_parquet.images[3].path == "3.png"

    members = {f"k.{i}.png": picture(i) for i in sorted(range(12), key=str)}
    (from_tar,) = read(write_tar(tmp_path / "a.tar", {**members, "k.txt": b"?"}))
    assert [image.data for image in from_tar.images] == wanted
    assert from_tar.images[3].path == "k.3.png"


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
        {"image": "http://images.example/a.jpg"},
    ],
)
def test_a_picture_that_is_named_and_not_found_is_no_question_without_one(tmp_path, row: Row):
    (tmp_path / "a.png").write_bytes(picture(1))
    (failure,) = read(write_jsonl(tmp_path / "a.jsonl", [{"question": "?", **row}]))
    assert failure.reason == "missing_image_file"


def test_base64_with_slashes_is_no_path(tmp_path: Path):
    """The smallest pictures are as short as paths; a broken long one is still named as base64."""
    dot = "R0lGODlhAQABAIAAAP///////yH5BAEAAAEALAAAAAABAAEAAAICTAEAOw=="
    assert "/" in dot and len(dot) < 100
    rows: list[Row | str] = [
        {"question": "1", "image": dot},
        {"question": "2", "image": f"data:image/gif;base64,{dot}"},
        {"question": "3", "image": f"*{'ab/d' * 40}"},
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
    assert failure.reason == "undecodable_image"


def test_a_data_set_at_a_url_reads_like_a_local_one(tmp_path: Path):
    fs = fsspec.filesystem("memory")
    local = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"question": "1", "image_path": "images/a.png"},
            {"question": "2", "image_path": "../out.png"},
            {"question": "3", "image_path": "images/no.png"},
            {"question": "4", "image_path": "s3://bucket/a.png"},
        ],
    )
    fs.pipe("/rows/a.jsonl", local.read_bytes())
    fs.pipe("/rows/images/a.png", picture(1))
    fs.pipe("/out.png", picture(2))
    first, second, *rest = read("memory://rows/a.jsonl")
    assert (first.images[0].data, second.images[0].data) == (picture(1), picture(2))
    assert [failure.reason for failure in rest] == ["missing_image_file"] * 2
    first, second, *rest = read("memory://rows/a.jsonl", image_root="memory://rows")
    assert first.images[0].data == picture(1)
    assert second.reason == "path_outside_root"


BAD_LINES: dict[str, Row | str] = {
    "missing_question": {"idx": 1},
    "empty_question": {"idx": 1, "question": " \n"},
    "invalid_question": {"idx": 1, "question": ["a", "b"]},
    "invalid_text": '{"idx": 1, "question": "\\ud800"}',
    "malformed_json": '{"idx": 1, "question": ',
    "bad_base64": {"idx": 1, "question": "?", "image": "!!!"},
    "undecodable_image": {"idx": 1, "question": "?", "image": "QUJD"},
    "missing_image_file": {"idx": 1, "question": "?", "image_path": "no.png"},
    "path_outside_root": {"idx": 1, "question": "?", "image_path": "../up.png"},
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path: Path, reason: str):
    (tmp_path / "up.png").write_bytes(picture(1))
    rows: list[Row | str] = [make_row(5), "", BAD_LINES[reason], make_row(6)]
    path = write_jsonl(tmp_path / "rows/a.jsonl", rows)
    first, failure, last = read(path, image_root=str(tmp_path / "rows"))
    assert (first.idx, last.idx) == ("5", "6")
    assert failure.reason == reason
    assert (failure.source, failure.row, failure.stage) == (str(path), 2, "input")
    assert failure.idx == ("" if reason == "malformed_json" else "1")
    json.dumps(failure.detail).encode()


@pytest.mark.parametrize(
    "line",
    ["[1, 2]", "null", '"text"', "not json", '{"a": 1} {"b": 2}', "[" * 100_000, "\x00"],
)
def test_lines_that_are_no_object_are_malformed(tmp_path: Path, line: str):
    (failure,) = read(write_jsonl(tmp_path / "a.jsonl", [line]))
    assert failure.reason == "malformed_json"


def test_bytes_that_are_not_utf8_are_malformed(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff\xfe"}\n{"question": "ok"}')
    failure, sample = read(tmp_path / "a.jsonl")
    assert failure.reason == "malformed_json"
    assert sample.question == "ok"


def test_a_byte_order_mark_and_nan_are_read(tmp_path: Path):
    text = '{"question": "a", "image": NaN, "idx": NaN}\r\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (sample,) = read(tmp_path / "a.jsonl")
    assert (sample.question, sample.images) == ("a", ())


def test_bad_rows_of_a_parquet_file_are_named_by_their_number(tmp_path: Path):
    rows = [make_row(i) for i in range(30)]
    rows[17]["question"] = None
    rows[20]["image"] = {"bytes": picture(20)[:-40], "path": "x"}
    rows[21]["image"] = {"bytes": b"", "path": None}
    path = write_parquet(tmp_path / "a.parquet", rows)
    failures = [item for item in read(path) if isinstance(item, Failure)]
    assert [(f.reason, f.row, f.idx) for f in failures] == [
        ("missing_question", 17, "17"),
        ("truncated_image", 20, "20"),
        ("undecodable_image", 21, "21"),
    ]


def test_too_many_pixels_are_rejected_by_the_setting(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [make_row(0)])
    assert isinstance(read(path, max_image_pixels=24 * 16)[0], Sample)
    assert read(path, max_image_pixels=24 * 16 - 1)[0].reason == "image_too_large"


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


def test_text_that_is_not_utf8_spoils_its_own_row_only(tmp_path: Path):
    broken = pa.array([b"fine", b"\xff", b"good"]).view(pa.string())
    pq.write_table(pa.table({"question": broken}), tmp_path / "a.parquet")
    first, failure, last = read(tmp_path / "a.parquet")
    assert (first.question, last.question) == ("fine", "good")
    assert (failure.reason, failure.row) == ("invalid_text", 1)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("size", [0, 10, 100])
def test_a_file_that_cannot_be_opened_is_one_failure(tmp_path: Path, name: str, size: int):
    WRITERS[name](tmp_path / name, [make_row(i) for i in range(40)])
    os.truncate(tmp_path / name, size)
    write_jsonl(tmp_path / "b.jsonl", [make_row(50)])
    failure, sample = read(tmp_path)
    assert (failure.reason, failure.row) == ("unreadable_file", 0)
    assert failure.source == str(tmp_path / name)
    assert sample.idx == "50"


def test_a_file_that_ends_early_keeps_what_was_read(tmp_path: Path):
    for name in ("a.arrow", "a.tar"):
        path = WRITERS[name](tmp_path / name, [make_row(i) for i in range(40)])
        os.truncate(path, path.stat().st_size * 2 // 3)
    pa_file, *_ = [item for item in read(tmp_path / "a.arrow")]
    assert pa_file.reason == "unreadable_file"  # the random access format has its index last
    *samples, failure = read(tmp_path / "a.tar")
    assert failure.reason == "unreadable_file"
    assert failure.row == len(samples) > 10
    assert [sample.idx for sample in samples] == [str(i) for i in range(len(samples))]
    assert all(sample.images for sample in samples)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.tar"])
@pytest.mark.parametrize("num_stumbles", [2, 99])
def test_a_file_on_a_disk_that_stumbles_is_read_on(tmp_path, monkeypatch, name, num_stumbles):
    """Once, the rest of a file was given up at the first error of a network's disk."""
    monkeypatch.setattr(time, "sleep", lambda wait_s: None)
    source = WRITERS[name](tmp_path / name, [make_row(i) for i in range(6)])
    (format,) = (file.format for file in list_inputs(str(source)))
    read_format = FORMAT_READERS[format]
    left = num_stumbles

    def stumbling(stream):
        nonlocal left
        for position, row in read_format(stream):
            if position == 3 and left:
                left -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            yield position, row

    monkeypatch.setitem(FORMAT_READERS, format, stumbling)
    items = read(source)
    assert [item.idx for item in items[:3]] == ["0", "1", "2"]
    if num_stumbles == 2:
        assert [item.idx for item in items[3:]] == ["3", "4", "5"]
    else:
        assert [(item.reason, item.row) for item in items[3:]] == [("unreadable_file", 3)]


def test_a_tar_cut_between_a_samples_members_gives_no_half_sample(tmp_path: Path):
    """The question alone would pass as a question without an image."""
    path = write_webdataset(tmp_path / "a.tar", [make_row(i) for i in range(5)])
    with tarfile.open(path) as tar:
        cut = next(member.offset for member in tar if member.name == "00003.png")
    os.truncate(path, cut)
    *samples, failure = read(path)
    assert [sample.idx for sample in samples] == ["0", "1", "2"]
    assert (failure.reason, failure.row) == ("unreadable_file", 3)


def test_members_that_do_not_follow_each_other_are_rejected(tmp_path: Path):
    """WebDataset would make a sample without its image of the first, silently."""
    path = write_tar(
        tmp_path / "a.tar",
        {
            "a.json": b'{"question": "a"}',
            "b.json": b'{"question": "b"}',
            "a.png": picture(1),
            "c.json": b'{"question": "c"}',
            "c.png": picture(2),
        },
    )
    items = read(path)
    assert [getattr(item, "reason", "sample") for item in items] == [
        "scattered_members",
        "sample",
        "scattered_members",
        "sample",
    ]


def test_a_bad_json_member_is_one_reject(tmp_path: Path):
    members = {"a.json": b"{", "a.png": picture(1), "b.txt": b"?", "c.png": picture(2)}
    members["d.txt"] = b"\xff"
    items = read(write_tar(tmp_path / "a.tar", members))
    assert [getattr(item, "reason", "sample") for item in items] == [
        "malformed_json",
        "sample",
        "missing_question",
        "invalid_text",
    ]
    assert [item.row for item in items if isinstance(item, Failure)] == [0, 2, 3]


def test_max_samples_counts_rows_of_the_whole_source(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [make_row(i) for i in range(4)])
    write_parquet(tmp_path / "b.parquet", [make_row(i) for i in range(4, 8)])
    assert [sample.idx for sample in read(tmp_path, max_samples=6)] == list("012345")
    assert len(read(tmp_path, max_samples=None)) == 8


def test_rows_say_where_they_stand(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [make_row(i) for i in range(3)])
    write_jsonl(tmp_path / "b.jsonl", ["", make_row(9)])
    places = [(Path(r.source).name, r.row) for r in read_rows(str(tmp_path), input_config())]
    assert places == [("a.parquet", 0), ("a.parquet", 1), ("a.parquet", 2), ("b.jsonl", 1)]


def test_a_missing_source_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        read(tmp_path / "nothing.parquet")
