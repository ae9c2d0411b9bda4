"""One record of each bad kind, and a truncated shard: all named, and nothing else is lost."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from stream_engine.demo.world import make_picture
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from tests.conftest import DEMO_FLAGS, answers
from tests.processes import run_rank

NUM_GOOD = 12


def good_row(number: int) -> dict[str, Any]:
    picture = make_picture(11, number)
    image = base64.b64encode(picture.png).decode()
    return {"question_id": picture.idx, "question": picture.question, "image": image}


@pytest.fixture
def bad_rows(tmp_path: Path) -> list[tuple[str, Any]]:
    """A line of each bad kind, by the reason it must be given."""
    png = make_picture(12, 0).png
    (tmp_path / "images").mkdir()
    (tmp_path / "outside.png").write_bytes(png)
    large = base64.b64encode(wide_png()).decode()
    row = good_row(100)
    return [
        ("missing_question", {"question_id": "b0", "image": row["image"]}),
        ("empty_question", {**row, "question_id": "b1", "question": "  "}),
        ("missing_image_file", {"question_id": "b2", "question": "?", "image_path": "gone.png"}),
        ("undecodable_image", {**row, "question_id": "b3", "image": encoded(b"no image")}),
        ("truncated_image", {**row, "question_id": "b4", "image": encoded(png[:-40])}),
        ("image_too_large", {**row, "question_id": "b5", "image": large}),
        ("bad_base64", {**row, "question_id": "b6", "image": "data:image/png;base64,@@@"}),
        ("malformed_json", '{"question": "cut off'),
        (
            "path_outside_root",
            {"question_id": "b8", "question": "?", "image_path": "../outside.png"},
        ),
        ("conflicting_id", {**good_row(0), "question": "Another question of the same id?"}),
    ]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wide_png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (200, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_bad_record_and_shard_is_named_and_nothing_else_is_lost(
    tmp_path: Path, bad_rows: list[tuple[str, Any]]
) -> None:
    rows: list[Any] = [good_row(i) for i in range(NUM_GOOD)]
    for i, (_, bad) in enumerate(bad_rows):
        rows.insert(1 + 2 * i, bad)
    dataset = tmp_path / "questions.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    dataset.write_text("".join(line + "\n" for line in lines))
    run_dir, log = RunDir(tmp_path / "run"), tmp_path / "log"
    words = [
        *DEMO_FLAGS,
        *("--dataset_path", dataset, "--work_dir", run_dir.root, "--retry_backoff_s=0"),
        *("--image_root", tmp_path / "images", "--max_image_pixels=10000"),
    ]
    assert run_rank(["shard", *words], log=log) == 2, log.read_text()
    tar = run_dir.shard(1)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])

    assert run_rank(["run", *words], log=log) == 2, log.read_text()

    text = log.read_text()
    for i, (reason, _) in enumerate(bad_rows):
        assert f"{dataset} row {1 + 2 * i}" in text, f"{reason} is not named"
        assert f": {reason}" in text
    assert f"shard 1 ({tar}" in text
    keys = [key for info in Manifest.load(run_dir).shards for key in info.keys]
    lost = Manifest.load(run_dir).shards[1].keys
    assert len(keys) == NUM_GOOD
    assert answers(run_dir.root).keys() == set(keys) - set(lost)
