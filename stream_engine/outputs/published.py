"""The record of a published dataset: size and checksum of every file, in its stats.json.

stats.json is written last and seals itself, so that a byte that changed anywhere in the folder, and
a file that is lost, can be told later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.outputs.formats.base import SPLITS
from stream_engine.run_dir.sealed import read_sealed

RECORD = "stats.json"
CARD = "README.md"
CARD_MARK = "\n- stream_engine\n"
"""Of a card's front matter: a folder whose record was lost is one of ours by it."""
CHUNK_BYTES = 1 << 20
HEAD_CHARACTERS = 4000


class FileRecord(msgspec.Struct, frozen=True):
    """A file, or (name ends in "/") all files of a folder: their sizes and checksums as one."""

    bytes: int
    sha256: str
    files: int = 1


def record_of(folder: Path) -> dict[str, FileRecord]:
    """Every file of a dataset's folder but its record, by name."""
    records: dict[str, FileRecord] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in SPLITS:
            records |= {f"{path.name}/{f.name}": record_of_file(f) for f in sorted(path.iterdir())}
        elif path.is_dir():
            records[f"{path.name}/"] = record_of_folder(path)
        elif path.name != RECORD:
            records[path.name] = record_of_file(path)
    return records


def record_of_file(path: Path) -> FileRecord:
    """One file."""
    return FileRecord(path.stat().st_size, sha256_of(path).hexdigest())


def content_hash(records: Mapping[str, FileRecord]) -> str:
    """Hash of files by their names and contents: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, record in records.items():
        digest.update(f"{name}\0{record.sha256}\0".encode())
    return digest.hexdigest()


def record_of_folder(folder: Path) -> FileRecord:
    """All files of a folder as one."""
    digest = hashlib.sha256()
    num_bytes = num_files = 0
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + sha256_of(path).digest())
        num_bytes += path.stat().st_size
        num_files += 1
    return FileRecord(num_bytes, digest.hexdigest(), num_files)


def sha256_of(path: Path) -> Any:
    """The hash of a file's content, read a part at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest


def file_problems(folder: Path) -> Iterator[str]:
    """Files that are not what was published, one line each; nothing for a dataset that is none of
    ours."""
    path = folder / RECORD
    if not path.exists():
        if is_ours(folder):
            yield f"{path}: is lost; the next merge makes the dataset again"
        return
    stats = read_sealed(path)
    if stats is None:
        yield f"{path}: is not what was written; the next merge makes the dataset again"
        return
    records = msgspec.convert(stats.get("files", {}), dict[str, FileRecord])
    found = record_of(folder)
    for name, record in records.items():
        if name not in found:
            yield f"{folder / name}: is lost"
        elif found[name] != record:
            yield f"{folder / name}: {difference(record, found[name])}"


def difference(record: FileRecord, found: FileRecord) -> str:
    """What has changed, in words."""
    if record.files != found.files:
        return f"{found.files} files, {record.files} were written"
    if record.bytes != found.bytes:
        return f"{found.bytes} bytes, {record.bytes} were written"
    return "its content is not what was written"


def is_intact(folder: Path, stats: Mapping[str, Any]) -> bool:
    """Whether a dataset's files are as published: by size, and by content where a file was written
    to after the record."""
    written = (folder / RECORD).stat().st_mtime_ns
    for name, record in msgspec.convert(stats.get("files", {}), dict[str, FileRecord]).items():
        path = folder / name
        if not path.exists():
            return False
        if name.endswith("/"):
            if path.stat().st_mtime_ns > written and record_of_folder(path) != record:
                return False
            continue
        status = path.stat()
        if status.st_size != record.bytes:
            return False
        if status.st_mtime_ns > written and sha256_of(path).hexdigest() != record.sha256:
            return False
    return True


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a dataset that a merge may replace."""
    if (folder / RECORD).is_file():
        return True
    try:
        head = (folder / CARD).read_text(encoding="utf-8", errors="replace")[:HEAD_CHARACTERS]
    except OSError:
        return False
    return head.startswith("---\n") and CARD_MARK in head
