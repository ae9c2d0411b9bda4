"""Files of several kinds: which are read, how, and which are named as not read."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_engine.errors import ConfigError
from stream_engine.inputs.readers import read_rows
from stream_engine.inputs.sources import find_inputs, local_files
from stream_engine.inputs.unread import Unread
from stream_engine.records import Failure, Sample
from tests.inputs.formats import read, write_webdataset
from tests.samples import input_config, make_row, picture, write_jsonl, write_parquet

ROWS = [{"idx": str(i), "question": f'What is {i}?\nAnd, "so"?'} for i in range(50)]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.parquet", "q.arrow", "q.tar"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    ],
)
def test_what_stands_in_a_files_place_is_named(
    tmp_path: Path, name: str, content: bytes, says: str
):
    (tmp_path / name).write_bytes(content)
    (failure,) = read(tmp_path / name)
    assert failure.reason == "unreadable_file" and says in failure.detail


def as_csv(rows: list[dict], delimiter: str = ",") -> bytes:
    lines = [delimiter.join(rows[0])]
    for row in rows:
        cells = (str(cell).replace('"', '""') for cell in row.values())
        lines.append(delimiter.join(f'"{cell}"' for cell in cells))
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_file_of_another_delimiter_is_read(tmp_path: Path, delimiter: str):
    (tmp_path / "q.csv").write_bytes(as_csv(ROWS[:3], delimiter))
    assert [sample.question for sample in read(tmp_path / "q.csv")] == [
        row["question"] for row in ROWS[:3]
    ]


CONTENT = {
    "q.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "q.ndjson": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "q.json": json.dumps(ROWS, indent=1).encode(),
    "q.csv": as_csv(ROWS),
    "q.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (['1,"never closed', "2,b", "3,c"], ["malformed_csv"]),
        (['"1","cut', '"2","b"', '"3","c"'], ["malformed_csv", "3"]),
        (['1,a 5" pipe', '2,"say ""so"""', '3,"c'], ["1", "2", "malformed_csv"]),
        (['1,"a"b', "2,b"], ["malformed_csv", "2"]),
    ],
)
def test_a_quote_out_of_place_takes_no_row_along_in_silence(
    tmp_path: Path, lines: list[str], found: list[str]
):
    """The rest of the file became the one cell whose quote was not closed."""
    (tmp_path / "q.csv").write_text("\n".join(["id,question", *lines]) + "\n")
    items = read(tmp_path / "q.csv")
    assert [getattr(item, "reason", item.idx) for item in items] == found


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", CONTENT)
def test_texts_are_read_compressed_or_not(tmp_path: Path, name: str, suffix: str):
    (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](CONTENT[name]))
    samples = read(tmp_path / f"{name}{suffix}")
    assert [sample.idx for sample in samples] == [row["idx"] for row in ROWS]
    assert [sample.question for sample in samples] == [row["question"] for row in ROWS]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"data": [{"question": "a"}, {"question": "b"}]}', id="wrapped-list"),
        pytest.param('{"question": "a"}\n{"question": "b"}', id="one-after-the-other"),
        pytest.param('\ufeff[{"question": "a"},{"question": "b"}]\n', id="byte-order-mark"),
    ],
)
def test_json_files_hold_objects_in_several_ways(tmp_path: Path, text: str):
    (tmp_path / "q.json").write_text(text)
    assert [sample.question for sample in read(tmp_path / "q.json")] == ["a", "b"]


TABLE = {"question": {"0": "a", "1": "b"}, "image": {"0": "a.png", "1": "b.png"}}
CELLS = [["a", "a.png"], ["b", "b.png"]]


@pytest.mark.parametrize(
    ("orient", "table"),
    [
        pytest.param("columns", TABLE, id="columns"),
        pytest.param("columns", {name: {"x-1": "a", "x-2": "b"} for name in TABLE}, id="labelled"),
        pytest.param(
            "index", {str(i): dict(zip(TABLE, row)) for i, row in enumerate(CELLS)}, id="index"
        ),
        pytest.param(
            "split", {"columns": [*TABLE], "index": [0, 1], "data": CELLS}, id="split-with-index"
        ),
        pytest.param("split", {"columns": [*TABLE], "data": CELLS}, id="split"),
    ],
)
@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_table_of_pandas_that_is_no_rows_is_named_with_what_helps(
    tmp_path: Path, name: str, orient: str, table: dict[str, Any]
):
    """It was refused as a row without a question."""
    (tmp_path / name).write_text(json.dumps(table))
    (failure,) = read(tmp_path / name)
    assert (failure.reason, failure.row) == ("malformed_json", 0)
    assert f'orient="{orient}"' in failure.detail
    assert 'orient="records", lines=True' in failure.detail


def test_a_row_whose_cells_are_all_turns_is_no_table(tmp_path: Path):
    sides = {name: {"role": "assistant", "content": name} for name in ("chosen", "rejected")}
    row = {"prompt": {"role": "user", "content": "?"}, **sides}
    (tmp_path / "q.json").write_text(json.dumps(row))
    (sample,) = read(tmp_path / "q.json", text_only="allow", given_answers="pairs")
    assert [answer.text for answer in sample.answers] == ["chosen", "rejected"]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep"),
        pytest.param('{"question": "?", "n": ' + "9" * 5000 + "}", id="huge-integer"),
        pytest.param('{"question" "no colon", "b": "]}"}', id="syntax"),
        pytest.param("7", id="number"),
        pytest.param("null", id="null"),
    ],
)
def test_a_bad_element_of_a_list_costs_itself_alone(tmp_path: Path, bad: str):
    (tmp_path / "q.json").write_text(f'[{{"question": "a"}}, {bad}, {{"question": "b"}}]')
    first, failure, last = read(tmp_path / "q.json")
    assert (first.question, last.question) == ("a", "b")
    assert (failure.reason, failure.row) == ("malformed_json", 1)


def test_a_large_list_is_read_across_its_chunks(tmp_path: Path):
    rows = [{"idx": i, "question": "?", "pad": 'x\\"]' * (i * 37 % 5000)} for i in range(600)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    assert (tmp_path / "q.json").stat().st_size > 3 << 20
    assert [sample.idx for sample in read(tmp_path / "q.json")] == [str(i) for i in range(600)]


def test_a_list_that_is_cut_keeps_what_was_read(tmp_path: Path):
    (tmp_path / "q.json").write_text('[{"question": "a"}, {"question": "b"}, {"quest')
    *samples, failure = read(tmp_path / "q.json")
    assert [sample.question for sample in samples] == ["a", "b"]
    assert (failure.reason, failure.row) == ("unreadable_file", 2)


def test_a_compressed_file_that_is_cut_is_named(tmp_path: Path):
    data = gzip.compress(CONTENT["q.jsonl"])
    (tmp_path / "q.jsonl.gz").write_bytes(data[: len(data) // 2])
    *_, failure = read(tmp_path / "q.jsonl.gz")
    assert failure.reason == "unreadable_file"


def test_a_csv_row_with_too_many_cells_is_named(tmp_path: Path):
    (tmp_path / "q.csv").write_text("idx,question\n1,What?\n2,Why, so?\n3,How?\n")
    items = read(tmp_path / "q.csv")
    assert [getattr(i, "reason", i.idx) for i in items] == ["1", "malformed_csv", "3"]


def test_a_row_group_that_fails_costs_its_own_rows(tmp_path: Path):
    rows = [make_row(i) for i in range(30)]
    path = write_parquet(tmp_path / "q.parquet", rows, row_group_size=10, compression="none")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 24] = b"\xff" * 24
    path.write_bytes(data)
    items = read(path)
    lost = [item.row for item in items if isinstance(item, Failure)]
    assert lost == list(range(10, 20))
    assert {i.reason for i in items if isinstance(i, Failure)} == {"unreadable_row_group"}
    assert [i.idx for i in items if isinstance(i, Sample)] == [
        str(i) for i in range(30) if i not in lost
    ]


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", [make_row(1)])
    write_parquet(tmp_path / "deep/b.parquet", [make_row(2)])
    write_webdataset(tmp_path / "deep/c.tar", [make_row(3)])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"idx": 4, "question": "?"}'))
    (tmp_path / "e.xlsx").write_bytes(b"PK")
    (tmp_path / "f.jsonl.7z").write_bytes(b"7z")
    (tmp_path / "picture.png").write_bytes(picture(1))
    (tmp_path / "README.md").write_text("notes")
    unread = Unread()
    rows = list(read_rows(str(tmp_path), input_config(), unread=unread))
    assert sorted(row.item.idx for row in rows) == ["1", "2", "3", "4"]
    assert unread.left_out == {".xlsx files": 1, ".7z files": 1}
    assert unread.examples[".xlsx files"] == str(tmp_path / "e.xlsx")


def test_linked_folders_are_followed_and_circles_are_cut(tmp_path: Path):
    """Two data disks linked into one folder were passed over without a word."""
    write_jsonl(tmp_path / "disk1/a.jsonl", [make_row(1)])
    write_jsonl(tmp_path / "disk2/b.jsonl", [make_row(2)])
    (tmp_path / "all").mkdir()
    for name in ("disk1", "disk2"):
        (tmp_path / "all" / name).symlink_to(tmp_path / name)
    (tmp_path / "disk1/back").symlink_to(tmp_path / "all")
    (tmp_path / "all/gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    found = find_inputs(str(tmp_path / "all"))
    assert [*local_files(f"{tmp_path}/")] == [*local_files(str(tmp_path))]
    assert {os.path.basename(file.path) for file in found.files} == {"a.jsonl", "b.jsonl"}
    assert [what for _, what in found.others] == ["broken links"]


def test_a_file_of_no_known_kind_is_refused_with_the_known_ones(tmp_path: Path):
    (tmp_path / "q.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"known suffixes are \.parquet, \.jsonl"):
        find_inputs(str(tmp_path / "q.xlsx"))
