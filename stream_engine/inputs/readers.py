"""Readers: a source of any known format as a stream of Samples and named rejects.

A row that cannot become a sample is a Failure with its file and its row: the 0-based number of
the row in a parquet or arrow file, of the line in a jsonl file (blank lines count), of the sample
in a tar. Memory holds a few rows at a time, whatever the size of the files.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.rows import COLUMNS, IMAGE_COLUMNS, KNOWN_COLUMNS, Row, idx_of, to_sample
from stream_engine.inputs.sources import Format, InputFile, input_fingerprint, list_inputs
from stream_engine.records import Failure, Sample
from stream_engine.run_dir.shards import tar_samples
from stream_engine.store.locations import folder_of
from stream_engine.store.transient import WAITS_S, is_transient, network_errors, wait

__all__ = [
    "InputRow",
    "input_fingerprint",
    "list_inputs",
    "read_rows",
    "read_samples",
    "unread_line",
]

UNREADABLE_FILE = "unreadable_file"
ROWS_PER_BATCH = 16
MAX_UNREAD = 20  # names of columns that are kept
PARQUET_BUFFER_BYTES = 1 << 20
IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif", "img")
)


class InputRow(NamedTuple):
    """A row as a sample or the reason why not, and where it stands."""

    source: str
    row: int
    item: Sample | Failure


class Unreadable(Exception):
    """A file that cannot be read (on); what was read of it before is kept."""


def read_samples(source: str, config: InputConfig) -> Iterator[Sample | Failure]:
    """Yield what a source holds, in order of its files' paths and of the rows in them.

    Raises:
        ConfigError: when the source does not exist or its format is unknown.
    """
    for row in read_rows(source, config):
        yield row.item


def read_rows(
    source: str,
    config: InputConfig,
    *,
    only: Collection[str] | None = None,
    unread: dict[str, None] | None = None,
) -> Iterator[InputRow]:
    """Like `read_samples`, with each item's file and row; at most `max_samples` rows.

    `only` names the files to read, where not all are. `unread` takes up the names of columns that
    no reader knows, in the order in which they come.
    """
    names: dict[str, None] = {} if unread is None else unread
    files = (file for file in list_inputs(source) if only is None or file.path in only)
    rows = (row for file in files for row in read_file(file, config, names))
    return islice(rows, config.max_samples)


def unread_line(names: Iterable[str]) -> str:
    """What to tell a user whose input has these columns."""
    return f"columns not read: {', '.join(names)}; images come from {', '.join(IMAGE_COLUMNS)}"


def read_file(file: InputFile, config: InputConfig, unread: dict[str, None]) -> Iterator[InputRow]:
    """The rows of one file. One that cannot be read (on) ends with an unreadable_file failure.

    After an error that may pass it is opened again, and goes on after the last row.
    """
    folder = folder_of(file.path)
    position = -1
    waits = iter(WAITS_S)
    while True:
        try:
            fs, path = fsspec.core.url_to_fs(file.path)
            with fs.open(path, "rb") as stream:
                for number, row in FORMAT_READERS[file.format](stream):
                    if number > position:
                        position = number
                        note_unread(row, unread)
                        item = convert(file, number, row, folder, config)
                        yield InputRow(file.path, number, item)
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


def note_unread(row: Row | RecordError, unread: dict[str, None]) -> None:
    """Take up the row's columns that no reader knows; a misnamed one would go unnoticed."""
    if isinstance(row, RecordError):
        return
    for name in row:
        if name not in KNOWN_COLUMNS and len(unread) < MAX_UNREAD:
            unread[name] = None


def convert(
    file: InputFile, position: int, row: Row | RecordError, folder: str, config: InputConfig
) -> Sample | Failure:
    """A row as a sample, or as the failure that says why not."""
    idx = ""
    try:
        if isinstance(row, RecordError):
            raise row
        idx = idx_of(row)
        return to_sample(row, folder, config)
    except RecordError as error:
        return Failure(
            reason=error.reason, detail=error.detail, source=file.path, row=position, idx=idx
        )


def parquet_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RecordError]]:
    """Rows of a parquet file, decoded a few at a time, pages read as they are needed.

    Columns that no reader knows are not decoded, and stand as None.
    """
    file = pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    columns = [name for name in file.schema_arrow.names if name in COLUMNS]
    batches = file.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns or None)
    unread = dict.fromkeys(name for name in file.schema_arrow.names if name not in COLUMNS)
    rows = (row for batch in batches for row in batch_rows(batch))
    yield from enumerate(row if isinstance(row, RecordError) else row | unread for row in rows)


def arrow_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RecordError]]:
    """Rows of an arrow file as `datasets` saves it, in the stream or the random access format."""
    slices = (
        batch.slice(start, ROWS_PER_BATCH)
        for batch in arrow_batches(stream)
        for start in range(0, batch.num_rows, ROWS_PER_BATCH)
    )
    yield from enumerate(row for batch in slices for row in batch_rows(batch))


def batch_rows(batch: pa.RecordBatch) -> list[Row | RecordError]:
    """The rows of a small batch; text that is no UTF-8 spoils its own row only."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
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


def jsonl_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RecordError]]:
    """The lines of a jsonl file; blank lines are passed over but counted."""
    for position, line in enumerate(stream):
        if position == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield position, parse_json(line)


def parse_json(text: bytes) -> Row | RecordError:
    """A JSON object, or the error that says why it is none. NaN is read as pandas writes it."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RecordError("malformed_json", str(error))
    if not isinstance(row, dict):
        return RecordError("malformed_json", f"{type(row).__name__} instead of an object")
    return row


def webdataset_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RecordError]]:
    """The samples of a tar: `key.json` or `key.txt`, and the images beside it.

    Members of one key must follow each other, for WebDataset splits them into two samples
    otherwise; and a tar without its end mark is cut, so that its last sample may lack members.
    Both are told from the headers before any sample is read.
    """
    scan = scan_tar(stream)
    stream.seek(0)
    for position, members in zip(range(scan.num_whole), tar_samples(stream, unreadable)):
        yield position, scan.scattered.get(members["__key__"]) or webdataset_row(members)
    if scan.is_cut:
        raise Unreadable("the tar has no end mark: it is cut, its last sample is left out")


class TarScan(NamedTuple):
    """What the headers of a tar tell: its whole samples, and the keys that are scattered."""

    num_whole: int
    scattered: dict[str, RecordError]
    is_cut: bool


def scan_tar(stream: BinaryIO) -> TarScan:
    """Read the headers of a tar; its keys are in memory meanwhile."""
    from webdataset.tariterators import base_plus_ext

    num_samples = 0
    seen: set[str] = set()
    scattered: dict[str, RecordError] = {}
    last = ""
    try:
        with tarfile.open(fileobj=stream, mode="r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                key = base_plus_ext(member.name)[0]
                if key and key != last and member.isreg():
                    if key in seen:
                        scattered[key] = RecordError(
                            "scattered_members", f"members of {key} do not follow each other"
                        )
                    seen.add(key)
                    num_samples += 1
                    last = key
            tar.fileobj.seek(tar.offset)
            is_cut = tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        if not seen:
            raise Unreadable(str(error)) from error
        is_cut = True
    return TarScan(num_samples - is_cut, scattered, is_cut)


def unreadable(detail: str, member: str) -> Unreadable:
    """The error of a tar that cannot be read on."""
    return Unreadable(f"{detail} (member {member})" if member else detail)


def webdataset_row(members: dict[str, Any]) -> Row | RecordError:
    """One sample of a tar as a row; images in natural order of their names."""
    parsed = parse_json(members["json"]) if "json" in members else {}
    if isinstance(parsed, RecordError):
        return parsed
    row = dict(parsed)
    if "question" not in row and "txt" in members:
        try:
            row["question"] = members["txt"].decode()
        except UnicodeDecodeError as error:
            return RecordError("invalid_text", str(error))
    names = [name for name in members if name.rpartition(".")[2] in IMAGE_SUFFIXES]
    if names:
        row["images"] = [
            {"bytes": members[name], "path": f"{members['__key__']}.{name}"}
            for name in sorted(names, key=natural_order)
        ]
    return row


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which 2.jpg comes before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


FORMAT_READERS: dict[Format, Callable[[BinaryIO], Iterator[tuple[int, Row | RecordError]]]] = {
    "parquet": parquet_rows,
    "jsonl": jsonl_rows,
    "arrow": arrow_rows,
    "tar": webdataset_rows,
}
