"""Texts of other encodings are read by their byte order marks."""

import json
from pathlib import Path

import pytest

from tests.inputs.formats import read, write_tar
from tests.samples import picture

ROWS = [{"id": str(i), "question": f"Où est {i}, \U0001f600?"} for i in range(3)]
CONTENT = {
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    "a.json": json.dumps(ROWS, ensure_ascii=False),
    "a.csv": "id,question\n" + "".join(f'{row["id"]},"{row["question"]}"\n' for row in ROWS),
    "a.tsv": "id\tquestion\n" + "".join(f"{row['id']}\t{row['question']}\n" for row in ROWS),
}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", CONTENT)
def test_a_text_with_a_byte_order_mark_is_read(tmp_path: Path, name: str, encoding: str):
    (tmp_path / name).write_bytes(CONTENT[name].encode(encoding))
    samples = read(tmp_path / name)
    assert [sample.question for sample in samples] == [row["question"] for row in ROWS]


def test_a_text_cut_within_a_character_is_an_unreadable_file(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(CONTENT["a.jsonl"].encode("utf-16")[:-1])
    *samples, failure = read(tmp_path / "a.jsonl")
    assert [sample.idx for sample in samples] == ["0", "1"]
    assert failure.reason == "unreadable_file"


def test_a_member_of_a_tar_in_utf16_is_read(tmp_path: Path):
    members = {"a.png": picture(1), "a.txt": "Où?".encode("utf-16")}
    (sample,) = read(write_tar(tmp_path / "a.tar", members))
    assert sample.question == "Où?"
