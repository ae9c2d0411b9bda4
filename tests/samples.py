"""Input data of every format, made from the same rows."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stream_engine.config import InputConfig
from stream_engine.records import EncodedImage, Sample, sample_key

Row = dict[str, Any]


def picture(number: int, format: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A small image whose content depends on the number."""
    image = Image.new("RGB", size)
    image.putdata([(number * 7 % 256, x * 5 % 256, number // 36) for x in range(size[0] * size[1])])
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def make_sample(number: int, num_images: int = 1) -> Sample:
    images = tuple(
        EncodedImage(picture(number + i), f"{number}-{i}.png") for i in range(num_images)
    )
    question = f"What is in picture {number}?"
    return Sample(
        key=sample_key(str(number), question, images),
        idx=str(number),
        question=question,
        images=images,
        ds_name="pictures",
        metainfos='{"number": 1}',
    )


def make_row(number: int) -> Row:
    """A row in the RLAIF-V parquet schema."""
    return {
        "idx": number,
        "question": f"What is in picture {number}?",
        "image": {"bytes": picture(number), "path": f"{number}.png"},
        "ds_name": "pictures",
    }


def write_parquet(path: Path, rows: list[Row], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_jsonl(path: Path, rows: list[Row | str]) -> Path:
    """Rows as JSON lines; bytes of images become base64, and strings are written as they are."""

    def line(row: Row | str) -> str:
        if isinstance(row, str):
            return row
        image = row.get("image")
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
            row = {**row, "image": base64.b64encode(image["bytes"]).decode()}
        return json.dumps(row)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line(row) + "\n" for row in rows), encoding="utf-8")
    return path


def input_config(**settings: Any) -> InputConfig:
    return InputConfig(**{"text_only": "allow", **settings})


def tree(root: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its relative path."""
    return dict(walk(root))


def walk(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(root)), path.read_bytes()
