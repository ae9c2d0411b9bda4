"""Readers: a source of any known format as a stream of Samples and named rejects.

A row that cannot become a sample is a Failure with its file and its row: the 0-based number of
the row in a parquet, arrow or csv file, of the line in a jsonl file (blank lines count), of the
element in a JSON list, of the sample in a tar. Memory holds a few rows at a time, whatever the size
of the files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

import fsspec
import pyarrow as pa

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.compression import decompressed
from stream_engine.inputs.encodings import as_utf8
from stream_engine.inputs.images import check_root
from stream_engine.inputs.json_files import json_rows, jsonl_rows
from stream_engine.inputs.layouts import Row, mapped
from stream_engine.inputs.rows import idx_of, to_sample
from stream_engine.inputs.sources import STREAMED, InputFile, find_inputs
from stream_engine.inputs.tables import arrow_rows, csv_rows, parquet_rows, tsv_rows
from stream_engine.inputs.tars import webdataset_rows
from stream_engine.inputs.unread import Unread, Unreadable
from stream_engine.records import Failure, Sample
from stream_engine.store.locations import folder_of
from stream_engine.store.transient import WAITS_S, is_transient, network_errors, wait
from stream_engine.text import HEAD_BYTES, not_the_file, printable

UNREADABLE_FILE = "unreadable_file"
MAX_PAGE_BYTES = 1 << 20
"""Larger ones are the files that they should be."""
STREAM_READERS = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "arrow": arrow_rows,
    "csv": csv_rows,
    "tsv": tsv_rows,
}


class InputRow(NamedTuple):
    """A row as a sample or the reason why not, and where it stands."""

    source: str
    row: int
    item: Sample | Failure
    notes: tuple[str, ...] = ()
    """What was done to the row on the way; see rows.ReadRow."""


def read_samples(source: str, config: InputConfig) -> Iterator[Sample | Failure]:
    """Yield what a source holds, in order of its files' paths and of the rows in them.

    Raises:
        ConfigError: when the source or image_root does not exist, or its format is unknown.
    """
    for row in read_rows(source, config):
        yield row.item


def read_rows(
    source: str,
    config: InputConfig,
    *,
    only: Collection[str] | None = None,
    unread: Unread | None = None,
) -> Iterator[InputRow]:
    """Like `read_samples`, with each item's file and row; at most `max_samples` rows.

    `only` names the files to read, where not all are. `unread` takes up what is not read of them,
    by name.
    """
    unread = Unread() if unread is None else unread
    unread.mapped = tuple(config.columns.values())
    check_root(config.image_root)
    found = find_inputs(source)
    for name, what in found.others:
        unread.note_left_out(what, name)
    files = (file for file in found.files if only is None or file.path in only)
    rows = (row for file in files for row in read_file(file, config, unread))
    return islice(rows, config.max_samples)


def read_file(file: InputFile, config: InputConfig, unread: Unread) -> Iterator[InputRow]:
    """The rows of one file. One that cannot be read (on) ends with an unreadable_file failure.

    After an error that may pass it is opened again, and goes on after the last row.
    """
    folder = folder_of(file.path)
    position = -1
    waits = iter(WAITS_S)
    while True:
        try:
            for number, row in rows_of(file, config, unread):
                if number > position:
                    position = number
                    if not isinstance(row, RecordError):
                        unread.note_columns(row)
                    yield convert(file, number, row, folder, config)
            return
        except (Unreadable, OSError, pa.ArrowException, *network_errors()) as error:
            cause = error.__cause__ if isinstance(error, Unreadable) else error
            wait_s = next(waits, None) if cause is not None and is_transient(cause) else None
            if wait_s is not None:
                wait(wait_s, error)
                continue
            failure = Failure(
                reason=UNREADABLE_FILE,
                detail=f"after {position + 1} rows: {error}" if position >= 0 else str(error),
                source=file.path,
                row=position + 1,
            )
            yield InputRow(file.path, position + 1, failure)
            return


def rows_of(
    file: InputFile, config: InputConfig, unread: Unread
) -> Iterator[tuple[int, Row | RecordError]]:
    """The numbered rows of a file in its format."""
    fs, path = fsspec.core.url_to_fs(file.path)

    def opened() -> BinaryIO:
        stream = fs.open(path, "rb")
        if file.format not in STREAMED and file.size > MAX_PAGE_BYTES:
            return stream
        if what := not_the_file(stream.read(HEAD_BYTES)):
            raise Unreadable(what)
        stream.seek(0)
        return decompressed(stream, path) if file.format in STREAMED else stream

    if file.format == "tar":
        yield from webdataset_rows(opened, unread)
        return
    with opened() as stream:
        if file.format == "parquet":
            yield from parquet_rows(stream, frozenset(config.columns.values()))
        else:
            text = stream if file.format == "arrow" else as_utf8(stream)
            yield from STREAM_READERS[file.format](text)


def convert(
    file: InputFile, position: int, row: Row | RecordError, folder: str, config: InputConfig
) -> InputRow:
    """A row as a sample, or as the failure that says why not."""
    idx = ""
    try:
        if isinstance(row, RecordError):
            raise row
        row = mapped(row, config.columns)
        idx = idx_of(row)
        try:
            sample, notes = to_sample(row, folder, config)
        except RecursionError as error:
            raise RecordError("nested_too_deep", str(error)) from error
        return InputRow(file.path, position, sample, notes)
    except RecordError as error:
        failure = Failure(
            reason=error.reason,
            detail=printable(error.detail),
            source=file.path,
            row=position,
            idx=idx,
        )
        return InputRow(file.path, position, failure)
