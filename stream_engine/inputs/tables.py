"""Parquet, arrow and csv files as rows with their numbers, a few at a time."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stream_engine.errors import RecordError
from stream_engine.inputs.json_files import as_object, as_row
from stream_engine.inputs.layouts import Row
from stream_engine.inputs.rows import COLUMNS, LOOKED_AT
from stream_engine.inputs.unread import Unreadable
from stream_engine.store.transient import is_transient

ROWS_PER_BATCH = 16
PARQUET_BUFFER_BYTES = 1 << 20
MAX_FIELD = 1 << 30
"""Characters of a cell of a csv file: a picture in base64 may be long."""

OTHER_DELIMITERS = (";", "\t")

Rows = Iterator[tuple[int, Row | RecordError]]


def parquet_rows(stream: BinaryIO, mapped: frozenset[str] = frozenset()) -> Rows:
    """Rows of a parquet file, decoded a few at a time, pages read as they are needed.

    Columns that nobody reads (neither we nor, `mapped`, --columns) are not decoded, and stand as
    None. A row group that fails costs its own rows.
    """
    file = pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    names = file.schema_arrow.names
    check_names(names)
    columns = [name for name in names if name in LOOKED_AT or name in mapped]
    unread = dict.fromkeys(name for name in names if name not in columns)
    position = 0
    for group in range(file.num_row_groups):
        end = position + file.metadata.row_group(group).num_rows
        try:
            batches = file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns or None)
            for batch in batches:
                for row in batch_rows(batch):
                    yield position, row if isinstance(row, RecordError) else row | unread
                    position += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_transient(error):
                raise
            for lost in range(position, end):
                yield lost, RecordError("unreadable_row_group", f"row group {group}: {error}")
        position = end


def arrow_rows(stream: BinaryIO) -> Rows:
    """Rows of an arrow file as `datasets` saves it, in the stream or the random access format."""
    slices = (
        batch.slice(start, ROWS_PER_BATCH)
        for batch in named_once(arrow_batches(stream))
        for start in range(0, batch.num_rows, ROWS_PER_BATCH)
    )
    yield from enumerate(row for batch in slices for row in batch_rows(batch))


def batch_rows(batch: pa.RecordBatch) -> list[Row | RecordError]:
    """The rows of a small batch; a cell that Python cannot hold spoils its own row only."""
    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows == 1:
            return [RecordError("invalid_text", str(error))]
        return [row for i in range(batch.num_rows) for row in batch_rows(batch.slice(i, 1))]


def arrow_batches(stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The record batches of an arrow file."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        yield from pa.ipc.open_stream(stream)


def named_once(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        check_names(batch.schema.names)
        yield batch


def check_names(names: list[str]) -> None:
    """Raise Unreadable for a table two of whose columns have one name: a row could hold but one."""
    for name in COLUMNS.intersection(names):
        if names.count(name) > 1:
            raise Unreadable(f"two columns are called {name!r}; rename one")


def csv_rows(stream: BinaryIO) -> Rows:
    """Rows of a csv file with names in its first line; empty cells are missing.

    Where that line has no comma, semicolons or tabs may separate, as some countries' Excel does.
    """
    yield from separated_rows(stream, ",")


def tsv_rows(stream: BinaryIO) -> Rows:
    """Rows of a file whose cells are separated by tabs."""
    yield from separated_rows(stream, "\t")


def lines_of_cells(reader: Any) -> Iterator[list[str] | RecordError]:
    """The cells of each row; a quote out of place costs the lines up to where it is noticed."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RecordError("malformed_csv", f"{error}, in line {reader.line_num}")


def separated_rows(stream: BinaryIO, delimiter: str) -> Rows:
    csv.field_size_limit(min(MAX_FIELD, sys.maxsize))
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, [])
        others = [mark for mark in OTHER_DELIMITERS if len(names) == 1 and mark in names[0]]
        if others and delimiter == ",":
            names = next(csv.reader(names, delimiter=others[0]))
            reader = csv.reader(text, delimiter=others[0], strict=True)
        rows = (cells for cells in lines_of_cells(reader) if cells)
        for position, cells in enumerate(rows):
            if isinstance(cells, RecordError):
                yield position, cells
            elif len(cells) > len(names):
                detail = f"{len(cells)} cells, the first line names {len(names)} columns"
                yield position, RecordError("malformed_csv", detail)
            else:
                filled = [(name, cell or None) for name, cell in zip(names, cells)]
                yield position, as_row(as_object(filled))
    except csv.Error as error:
        raise Unreadable(str(error)) from error
    finally:
        text.detach()
