"""The record of a published dataset: size and checksum of every file, in its stats.json.

stats.json seals itself, so that a byte that changed anywhere in the folder, or a lost file, can be
told later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.run_dir.sealed import read_sealed
from stream_engine.store import files
from stream_engine.store.base import Entry, Location
from stream_engine.text import one_line

RECORD = "stats.json"
CARD = "README.md"
CARD_MARK = "\n- stream_engine\n"
"""Of a card's front matter: a folder whose record was lost is one of ours by it."""
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 4000
IMAGES = "images"
"""The folder of pictures that rows name; what earlier rows named stays in it."""


class NamedImages(msgspec.Struct, frozen=True):
    """The little of a row that tells its pictures."""

    images: list[str] = []


class FileRecord(msgspec.Struct, frozen=True):
    """A file, or (name ends in "/") all files of a folder: their sizes and checksums as one."""

    bytes: int
    sha256: str
    files: int = 1


def record_of(folder: Path, *, but: Container[str]) -> dict[str, FileRecord]:
    """Every other file of a folder of this machine, by name; those of IMAGES as one."""
    records: dict[str, FileRecord] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name == IMAGES:
            records[f"{IMAGES}/"] = record_of_images(path, [f.name for f in path.iterdir()])
            continue
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            name = file.relative_to(folder).as_posix()
            if name not in but:
                records[name] = record_of_file(file)
    return records


def record_of_file(path: Location) -> FileRecord:
    """One file.

    Raises:
        FileNotFoundError: when there is none.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with files.open_file(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileRecord(num_bytes, digest.hexdigest())


def record_of_bytes(content: bytes) -> FileRecord:
    """What a file of this content will be."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def content_hash(records: Mapping[str, FileRecord]) -> str:
    """Hash of files by their names and contents: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, record in records.items():
        digest.update(f"{name}\0{record.sha256}\0".encode())
    return digest.hexdigest()


def record_of_images(folder: Location, names: Iterable[str]) -> FileRecord:
    """These files of a folder as one.

    Raises:
        FileNotFoundError: when one is missing.
    """
    digest, num_bytes, num_files = hashlib.sha256(), 0, 0
    for name in sorted(set(names)):
        record = record_of_file(folder / name)
        digest.update(f"{name}\0{record.sha256}".encode())
        num_bytes += record.bytes
        num_files += 1
    return FileRecord(num_bytes, digest.hexdigest(), num_files)


def file_problems(folder: Location) -> Iterator[str]:
    """Files that are not what was published, one line each; nothing for a dataset that is none of
    ours."""
    path = folder / RECORD
    if not files.exists(path):
        if is_ours(folder):
            yield f"{path}: is lost; the next merge makes the dataset again"
        return
    try:
        stats = read_sealed(path)
    except OSError as error:
        yield f"{path}: {unreadable(error)}"
        return
    if stats is None:
        yield f"{path}: is not what was written; the next merge makes the dataset again"
        return
    for name, record in recorded(stats).items():
        try:
            if name == f"{IMAGES}/":
                parts = [folder / part["name"] for part in stats["parts"]]
                found = record_of_images(folder / IMAGES, images_of(parts))
            else:
                found = record_of_file(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            yield f"{folder / name}: is lost"
            continue
        except OSError as error:
            yield f"{error.filename or folder / name}: {unreadable(error)}"
            continue
        if found != record:
            yield f"{folder / name}: {difference(record, found)}"


def unreadable(error: Exception) -> str:
    """Why a file cannot be read, or not to its end, as a problem of it."""
    said = error.strerror if isinstance(error, OSError) else None
    return f"cannot be read: {said or one_line(error)}"


def read_record(folder: Location) -> dict[str, Any] | None:
    """A dataset's record; None when it is missing, not what was written, or cannot be read."""
    try:
        return read_sealed(folder / RECORD)
    except OSError:
        return None


def recorded(stats: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The files that a record tells, by name."""
    return msgspec.convert(stats.get("files", {}), dict[str, FileRecord])


def images_of(parts: Iterable[Location]) -> Iterator[str]:
    """The picture files that rows of JSON lines name."""
    for part in parts:
        with files.open_file(part) as file:
            for line in file:
                try:
                    named = msgspec.json.decode(line, type=NamedImages)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # the part is told as damaged
                for name in named.images:
                    yield name.rpartition("/")[2]


def difference(record: FileRecord, found: FileRecord) -> str:
    """What has changed, in words."""
    if record.files != found.files:
        return f"{found.files} files, {record.files} were written"
    if record.bytes != found.bytes:
        return f"{found.bytes} bytes, {record.bytes} were written"
    return "its content is not what was written"


def is_intact(folder: Location, stats: Mapping[str, Any]) -> bool:
    """Whether a dataset's files are as published, by a quick look."""
    return next(quick_problems(folder, stats), None) is None


def quick_problems(folder: Location, stats: Mapping[str, Any]) -> Iterator[str]:
    """Files that are not as published: by size, and by content where a file was written to after
    the record. The card is written last: an older one is of a publication that was killed."""
    entries = entries_of(folder)
    if RECORD not in entries:
        yield f"{folder / RECORD}: is lost"
        return
    written = entries[RECORD].modified
    for name, record in recorded(stats).items():
        if name == f"{IMAGES}/":
            num_files = len(files.list_files(folder / IMAGES))
            if num_files < record.files:
                yield f"{folder / name}: {num_files} files, {record.files} were written"
            continue
        entry = entries.get(name)
        if entry is None:
            yield f"{folder / name}: is lost"
        elif entry.size != record.bytes:
            yield f"{folder / name}: {entry.size} bytes, {record.bytes} were written"
        elif name != CARD and entry.modified <= written:
            continue
        elif (found := record_of_file(entry.path)) != record:
            yield f"{folder / name}: {difference(record, found)}"


def parts_of(folder: Location) -> list[Location]:
    """The files of rows that a dataset's record names; else all that look like some."""
    stats = read_record(folder)
    if stats is not None:
        return [folder / part["name"] for part in stats["parts"]]
    paths = [entry.path for entry in entries_of(folder).values()]
    return [path for path in paths if path.suffix in (".parquet", ".jsonl")]


def entries_of(folder: Location) -> dict[str, Entry]:
    """The files of a dataset as they are, by name; without those of IMAGES."""
    entries = {entry.name: entry for entry in files.list_files(folder)}
    for inner in files.list_folders(folder):
        if inner.name != IMAGES:
            found = files.list_files(inner)
            entries |= {f"{inner.name}/{entry.name}": entry for entry in found}
    return entries


def is_ours(folder: Location) -> bool:
    """Whether a folder holds a dataset that a merge may replace."""
    if files.exists(folder / RECORD):
        return True
    head = (files.read_bytes(folder / CARD) or b"")[:HEAD_BYTES].decode(errors="replace")
    return head.startswith("---\n") and CARD_MARK in head
