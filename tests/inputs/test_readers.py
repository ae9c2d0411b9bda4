import errno
import json
import os
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_engine.errors import ConfigError
from stream_engine.inputs import readers
from stream_engine.inputs.readers import read_rows
from stream_engine.inputs.unread import Unread
from stream_engine.records import Failure, Sample, sample_key
from stream_engine.run_dir.shards import write_shard
from tests.inputs.formats import WRITERS, read, write_tar
from tests.samples import (
    Row,
    input_config,
    make_row,
    make_sample,
    picture,
    write_jsonl,
    write_parquet,
)


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
    unread = Unread()
    assert len(list(read_rows(str(path), input_config(), unread=unread))) == 20
    assert list(unread.columns) == ["image_file"]


def test_a_runs_own_shards_hold_no_unread_columns(tmp_path: Path):
    write_shard(tmp_path / "000000.tar", 0, [make_sample(1)])
    unread = Unread()
    assert len(list(read_rows(str(tmp_path / "000000.tar"), input_config(), unread=unread))) == 1
    assert not unread.lines()


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
    assert [failure.reason for failure in rest] == ["missing_image_file", "remote_image"]
    first, second, *rest = read("memory://rows/a.jsonl", image_root="memory://rows")
    assert first.images[0].data == picture(1)
    assert second.reason == "path_outside_root"


BAD_LINES: dict[str, Row | str] = {
    "missing_question": {"idx": 1},
    "empty_question": {"idx": 1, "question": " \n"},
    "invalid_question": {"idx": 1, "question": ["a", "b"]},
    "invalid_text": '{"idx": 1, "question": "\\ud800"}',
    "malformed_json": '{"idx": 1, "question": ',
    "bad_base64": {"idx": 1, "question": "?", "image": "data:image/png;base64,!!!"},
    "undecodable_image": {"idx": 1, "question": "?", "image": "QUJD" * 40},
    "remote_image": {"idx": 1, "question": "?", "image": "https://a.example/a.png"},
    "unknown_image_form": {"idx": 1, "question": "?", "image": {"pixels": [[1, 2]]}},
    "image_mark_mismatch": {"idx": 1, "question": "<image> and <image>?", "image": ""},
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"question": "caf\xe9"}\n{"question": "ok"}'),
        ("a.json", b'[{"question": "caf\xe9"}, {"question": "ok"}]'),
        ("a.csv", b"question\ncaf\xe9\nok\n"),
    ],
)
def test_bytes_that_are_not_utf8_cost_their_row_alone(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    failure, sample = read(tmp_path / name)
    assert failure.reason == "invalid_text"
    assert sample.question == "ok"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"question": "?", "image": "a", "image": "b"}', "doubled_column"),
        ("a.json", b'[{"question": "?", "image": "a", "image": "b"}]', "doubled_column"),
        ("a.csv", b"question,image,image\n?,a,b\n", "doubled_column"),
        ("a.jsonl", b'{"question": "?", "question": "?", "metainfos": {"a": 1, "a": 2}}', ""),
    ],
)
def test_a_name_that_stands_twice_hides_no_value(
    tmp_path: Path, name: str, content: bytes, reason: str
):
    """The last one was taken without a word, and the first picture was lost."""
    (tmp_path / name).write_bytes(content)
    (item,) = read(tmp_path / name)
    assert getattr(item, "reason", "") == reason


@pytest.mark.parametrize("column", ["image", "images", "messages", "metainfos", "id", "answers"])
@pytest.mark.parametrize("deep", ['{"image": ', "[", '{"a": ['])
def test_a_row_nested_beyond_reason_costs_no_other(tmp_path: Path, column: str, deep: str):
    """Depths that the parser takes and our own code does not ended the run, at each start again."""
    depth = 900 // deep.count("[") if "[" in deep else 900
    end = "".join("]" if letter == "[" else "}" for letter in reversed(deep) if letter in "[{")
    value = deep * depth + '"x"' + end * depth
    line = f'{{"question": "?", "{column}": {value}}}'
    *items, last = read(write_jsonl(tmp_path / "a.jsonl", [line, {"question": "ok"}]))
    assert last.question == "ok" and len(items) == 1


def test_lists_that_follow_each_other_in_a_file_are_all_read(tmp_path: Path):
    """The second was lost without a word."""
    path = tmp_path / "a.json"
    path.write_text('[{"question": "a"}]\n[]\n[{"question": "b"}]\n')
    assert [item.question for item in read(path)] == ["a", "b"]
    path.write_text('[{"question": "a"}] {"question": "b"}')
    sample, failure = read(path)
    assert (sample.question, failure.reason) == ("a", "unreadable_file")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path, name: str):
    arrays = [pa.array([text]) for text in ("?", "a", "b")]
    table = pa.Table.from_arrays(arrays, names=["question", "image", "image"])
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    (failure,) = read(tmp_path / name)
    assert failure.reason == "unreadable_file" and "'image'" in failure.detail


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
    rows_of = readers.rows_of
    left = num_stumbles

    def stumbling(file, config, unread):
        nonlocal left
        for position, row in rows_of(file, config, unread):
            if position == 3 and left:
                left -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            yield position, row

    monkeypatch.setattr(readers, "rows_of", stumbling)
    items = read(source)
    assert [item.idx for item in items[:3]] == ["0", "1", "2"]
    if num_stumbles == 2:
        assert [item.idx for item in items[3:]] == ["3", "4", "5"]
    else:
        assert [(item.reason, item.row) for item in items[3:]] == [("unreadable_file", 3)]


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
