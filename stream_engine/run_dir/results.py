"""Per-shard results: one file per stage and shard, complete or absent.

    magic | header | record | record | ... | footer

Header and records are msgpack, each after its length (u32, little endian). The footer holds the
file's size and the SHA-256 of everything before it, so that a cut file shows without being read.
The quarantine file is written first, under a name of its own that the header tells: a result file
that exists has all its counts accounted for.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO, TypeVar

import msgspec

from stream_engine.config import Stage
from stream_engine.errors import ChangedError, ConservationError, ShardReadError
from stream_engine.records import SCHEMA_VERSION, Failure, SampleRewards, SampleRollouts
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import CHUNK_BYTES, HashingWriter
from stream_engine.store import files
from stream_engine.store.base import Entry, Location, Version

RecordT = TypeVar("RecordT", bound=msgspec.Struct)

MAGIC = b"SERESULT"
END_MAGIC = b"SEEND\x00\x00\x01"
LENGTH = struct.Struct("<I")
FOOTER = struct.Struct("<Q32s8s")
HEAD_BYTES = 1 << 14
"""More than any header has."""

RECORD_TYPES: dict[Stage, type[SampleRollouts] | type[SampleRewards]] = {
    "rollouts": SampleRollouts,
    "rewards": SampleRewards,
}
"""What a stage's result files hold."""


class ResultHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a result file holds, of which shard, and which settings made it."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    shard: int
    shard_sha256: str
    fingerprint: str
    num_samples: int
    num_results: int
    num_quarantined: int
    quarantine: str = ""
    """The name of the file of its quarantined records, if there are any."""
    created_by: dict[str, Any] = {}


HEADER_DECODER = msgspec.msgpack.Decoder(ResultHeader)


def write_results(
    run_dir: RunDir,
    header: ResultHeader,
    records: Iterable[msgspec.Struct],
    failures: Sequence[Failure],
    *,
    over: Version | None,
) -> None:
    """Write a shard's quarantine file (none when nothing failed), then its result file.

    Args:
        over: the version of the result that this one replaces; None where there is none.

    Raises:
        ChangedError: when another process has written the result since.
        ConservationError: when the header's counts are not those of records and failures.
    """
    if header.num_samples != header.num_results + header.num_quarantined:
        raise ConservationError(
            f"{header.stage} of shard {header.shard}: {header.num_samples} samples, but "
            f"{header.num_results} results and {header.num_quarantined} quarantined"
        )
    if len(failures) != header.num_quarantined:
        raise ConservationError(
            f"{header.stage} of shard {header.shard}: {len(failures)} failures, "
            f"the header says {header.num_quarantined}"
        )
    path = run_dir.result(header.stage, header.shard)
    before = quarantine_of(path) if over is not None else ""
    name = write_quarantine(run_dir, f"{header.stage}-{header.shard:06d}", failures)
    with files.spool(path.parent) as new:
        write_records(new.file, msgspec.structs.replace(header, quarantine=name), records)
        new.publish(path, over)
    if before:
        files.erase(run_dir.quarantine(before))


def quarantine_of(path: Location) -> str:
    """The name of a result's quarantine file; empty without one, or when it cannot be told."""
    try:
        return read_header(path).quarantine
    except ShardReadError:
        return ""


def write_records(file: BinaryIO, header: ResultHeader, records: Iterable[msgspec.Struct]) -> None:
    """Write header, records and footer to an open file."""
    hashing = HashingWriter(file)
    hashing.write(MAGIC)
    encoder = msgspec.msgpack.Encoder()
    num_written = 0
    for record in chain((header,), records):
        encoded = encoder.encode(record)
        hashing.write(LENGTH.pack(len(encoded)))
        hashing.write(encoded)
        num_written += record is not header
    if num_written != header.num_results:
        raise ConservationError(
            f"{header.stage} of shard {header.shard}: {num_written} records, "
            f"the header says {header.num_results}"
        )
    file.write(FOOTER.pack(hashing.num_bytes + FOOTER.size, hashing.digest.digest(), END_MAGIC))


def write_quarantine(run_dir: RunDir, prefix: str, failures: Iterable[Failure]) -> str:
    """Write failures, one JSON line each, to a new file; returns its name, empty without any.

    No name is ever used twice, so that a file which nothing names any more can be erased.
    """
    lines = b"".join(msgspec.json.encode(failure) + b"\n" for failure in failures)
    if not lines:
        return ""
    name = quarantine_name(prefix)
    files.create(run_dir.quarantine(name), lines)
    return name


def quarantine_name(prefix: str) -> str:
    """A new name for a quarantine file."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}.jsonl"


def read_quarantine(path: Location) -> Iterator[Failure]:
    """The failures in a quarantine file.

    Raises:
        ShardReadError: when the file is missing, or a line is damaged.
    """
    try:
        with files.open_file(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield msgspec.json.decode(line, type=Failure)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ShardReadError(path, f"line {number}: {error}") from error
    except OSError as error:
        raise ShardReadError(path, error.strerror or str(error)) from error


def quarantined_by(run_dir: RunDir, header: ResultHeader) -> Iterator[Failure]:
    """The records that a result's stage set aside.

    Raises:
        ShardReadError: when their file is missing, damaged, or has not as many as the header says.
    """
    if not header.num_quarantined:
        return
    path = run_dir.quarantine(header.quarantine)
    num_read = 0
    for failure in read_quarantine(path):
        num_read += 1
        yield failure
    if num_read != header.num_quarantined:
        raise ShardReadError(path, f"{num_read} records, its result says {header.num_quarantined}")


def read_header(file: Location | Entry) -> ResultHeader:
    """The header of a result file, after checking that the file ends where it should.

    Args:
        file: its name, or what a listing said of it.

    Raises:
        ShardReadError: when the file is missing, cut, no result file or of a newer version.
    """
    return read_identified(file)[0]


def read_identified(file: Location | Entry) -> tuple[ResultHeader, str]:
    """The header of a result file, and the checksum that its end states: no other content has it.

    Raises:
        ShardReadError: as `read_header`.
    """
    try:
        head, tail, size = files.read_ends(file, head=HEAD_BYTES, tail=FOOTER.size)
    except OSError as error:
        raise ShardReadError(path_of(file), error.strerror or str(error)) from error
    header = parse_ends(file, head, tail, size)
    return header, FOOTER.unpack(tail)[1].hex()


def read_results(
    path: Location, record_type: type[RecordT], *, checksum: str | None = None
) -> Iterator[RecordT]:
    """Yield the records of a result file, one at a time, after verifying its checksum.

    Args:
        checksum: of the very content that is wanted, as `read_identified` told it.

    Raises:
        ChangedError: when another process has replaced that content since.
        ShardReadError: when the file is missing, cut or changed; it names the file.
    """
    try:
        with files.open_file(path) as file:
            header = parse_header(path, file)
            start = file.tell()
            verify_checksum(path, file, wanted=checksum)
            file.seek(start)
            decoder = msgspec.msgpack.Decoder(record_type)
            for number in range(header.num_results):
                try:
                    yield decoder.decode(read_frame(path, file))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ShardReadError(path, str(error), f"record {number}") from error
    except OSError as error:
        raise ShardReadError(path, error.strerror or str(error)) from error


def verify_result(path: Location, *, checksum: str | None = None) -> None:
    """Check a result file's checksum, as `read_results` does.

    Raises:
        ChangedError: when another process has replaced the content of that `checksum`.
        ShardReadError: when the file is missing, cut or changed; it names the file.
    """
    try:
        with files.open_file(path) as file:
            parse_header(path, file)
            verify_checksum(path, file, wanted=checksum)
    except OSError as error:
        raise ShardReadError(path, error.strerror or str(error)) from error


def parse_header(path: Location, file: BinaryIO) -> ResultHeader:
    """Check magic, size and version; leaves the file at the first record."""
    size = size_of(file)
    head = file.read(HEAD_BYTES)
    file.seek(max(0, size - FOOTER.size))
    header = parse_ends(path, head, file.read(FOOTER.size), size)
    file.seek(len(MAGIC))
    read_frame(path, file)
    return header


def parse_ends(file: Location | Entry, head: bytes, tail: bytes, size: int) -> ResultHeader:
    """The header, from a file's first and last bytes."""
    if size < len(MAGIC) + LENGTH.size + FOOTER.size or not head.startswith(MAGIC):
        raise ShardReadError(path_of(file), "not a complete result file")
    stated_size, _, end_magic = FOOTER.unpack(tail)
    if end_magic != END_MAGIC or stated_size != size:
        raise ShardReadError(path_of(file), "the file is cut or changed at its end")
    start = len(MAGIC) + LENGTH.size
    (length,) = LENGTH.unpack_from(head, len(MAGIC))
    try:
        header = HEADER_DECODER.decode(memoryview(head)[start : start + length])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardReadError(path_of(file), f"bad header: {error}") from error
    if header.schema_version > SCHEMA_VERSION:
        said = f"schema version {header.schema_version}, this program knows {SCHEMA_VERSION}"
        raise ShardReadError(path_of(file), said)
    return header


def path_of(file: Location | Entry) -> Location:
    return file.path if isinstance(file, Entry) else file


def read_frame(path: Location, file: BinaryIO) -> bytes:
    """The next length-prefixed piece."""
    prefix = file.read(LENGTH.size)
    if len(prefix) == LENGTH.size:
        (length,) = LENGTH.unpack(prefix)
        data = file.read(length)
        if len(data) == length:
            return data
    raise ShardReadError(path, "the file ends inside a record")


def verify_checksum(path: Location, file: BinaryIO, *, wanted: str | None = None) -> None:
    """Compare the footer's checksum with the bytes before it, and with the one that is wanted."""
    remaining = size_of(file) - FOOTER.size
    digest = hashlib.sha256()
    file.seek(0)
    while remaining > 0:
        chunk = file.read(min(CHUNK_BYTES, remaining))
        if not chunk:
            break
        digest.update(chunk)
        remaining -= len(chunk)
    if digest.digest() != FOOTER.unpack(file.read(FOOTER.size))[1]:
        raise ShardReadError(path, "its checksum does not match its content")
    if wanted is not None and digest.hexdigest() != wanted:
        raise ChangedError(path)


def size_of(file: BinaryIO) -> int:
    """An open file's bytes; leaves it where it is."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size
