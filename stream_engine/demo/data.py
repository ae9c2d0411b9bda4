"""Write datasets of the demo world in the input format of the engine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stream_engine.demo.world import make_picture
from stream_engine.errors import ConfigError
from stream_engine.store.local import temporary_path

SCHEMA = pa.schema(
    [
        ("idx", pa.string()),
        ("question", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)
FORMATS = ("parquet",)
_ROWS_PER_GROUP = 1000


def write_dataset(out: Path, count: int, seed: int, format: str = "parquet") -> Path:
    """Write `count` pictures with questions to the file `out` and return it.

    The same seed gives the same pictures, and a larger count only adds to them. Columns: `idx`
    (unique; the truth of the picture can be had from it), `question`, `image` {bytes, path}.
    Rows are written in groups, so that memory does not grow with `count`.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
    if count < 1 or seed < 0:
        raise ConfigError(f"count {count} must be at least 1 and seed {seed} at least 0")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_path(out)
    with open(partial, "wb") as file:
        _write_rows(file, count, seed)
    partial.replace(out)
    return out


def dataset_bytes(count: int, seed: int) -> bytes:
    """The content of such a file."""
    file = io.BytesIO()
    _write_rows(file, count, seed)
    return file.getvalue()


def _write_rows(file: BinaryIO, count: int, seed: int) -> None:
    with pq.ParquetWriter(file, SCHEMA) as writer:
        for start in range(0, count, _ROWS_PER_GROUP):
            numbers = range(start, min(count, start + _ROWS_PER_GROUP))
            rows = [_row(seed, number) for number in numbers]
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _row(seed: int, number: int) -> dict:
    picture = make_picture(seed, number)
    image = {"bytes": picture.png, "path": f"{picture.idx}.png"}
    return {"idx": picture.idx, "question": picture.question, "image": image}
