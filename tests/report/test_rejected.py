"""Rejected records are shown with the question and pictures of their rows, where they can be."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.readers import read_samples
from stream_engine.pictures import small_picture
from stream_engine.records import Failure
from stream_engine.report.rejected import MAX_ROW, rejected_entries


def png(size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict[str, object]]) -> list[Failure]:
    """A jsonl file of these rows; returns what a run would reject of it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [item for item in read_samples(str(path), InputConfig()) if isinstance(item, Failure)]


def test_a_rejected_row_is_shown_with_its_question_and_picture(tmp_path: Path) -> None:
    picture = base64.b64encode(png()).decode()
    failures = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"id": "fine", "question": "Fine?", "image": picture},
            {"id": "marks", "question": "Two <image> of <image> one?", "image": picture},
            {"id": "torn", "question": "Torn?", "image": picture[:40]},
            {"id": "none", "question": "Without?"},
        ],
    )
    assert [failure.idx for failure in failures] == ["marks", "torn", "none"]
    found = list(rejected_entries(failures, InputConfig()))
    assert [one.entry.idx for one in found] == ["marks", "torn", "none"]
    assert [one.entry.fate for one in found] == [f"input: {f.reason}" for f in failures]
    assert found[0].entry.question == "Two <image> of <image> one?"
    assert found[1].entry.question == "Torn?"
    assert found[0].sample.images[0].data == png()
    assert found[2].sample.images == ()
    assert "rows.jsonl, row 1" in found[0].entry.detail
    assert len({one.entry.id for one in found}) == 3


def test_a_row_that_is_another_one_by_now_is_not_shown(tmp_path: Path) -> None:
    failures = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "question": "Old?"}])
    write_rows(tmp_path / "rows.jsonl", [{"id": "b", "question": "New?"}])
    [found] = rejected_entries(failures, InputConfig())
    assert (found.entry.idx, found.entry.question) == ("a", "")


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Failure(reason="r", source="/no/such/file.jsonl", row=0), id="gone"),
        pytest.param(Failure(reason="r", source="s3://bucket/rows.jsonl", row=0), id="remote"),
        pytest.param(Failure(reason="r", source="rows.jsonl", row=MAX_ROW), id="far"),
        pytest.param(Failure(reason="r", source="rows.jsonl", row=-1), id="no-row"),
    ],
)
def test_a_row_that_cannot_be_had_is_shown_by_its_reason(failure: Failure) -> None:
    [found] = rejected_entries([failure], InputConfig())
    assert (found.entry.fate, found.sample.images) == ("input: r", ())
    assert failure.source in found.entry.detail


def test_a_bomb_and_a_program_are_not_opened() -> None:
    """A picture of 30000 x 30000 pixels in few bytes, and PostScript, which Pillow would run."""
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    with pytest.raises(RecordError) as caught:
        small_picture(buffer.getvalue(), longest=64)
    assert caught.value.reason == "image_too_large"
    with pytest.raises(RecordError) as caught:
        small_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", longest=64)
    assert caught.value.reason == "undecodable_image"
