"""Tars of shards: plain files of short names, one sample's side by side.

They are read and written block by block, without a general reader of tars (in an eighth of its
time, and without importing torch, which webdataset does). What is not of that kind is refused by
the reader: see shards.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from tarfile import LENGTH_NAME, RECORDSIZE, TarInfo
from typing import Any, BinaryIO, Protocol

BLOCK = 512
END = bytes(BLOCK)
PLAIN_FILE = b"0"
SIZE = slice(124, 136)
CHECKSUM = slice(148, 156)
MOST_BYTES = 8**11
BLANKS = b" " * 8
"""What stands for the checksum while it is computed."""


def template() -> bytes:
    """A header of a file without name and size, whose checksum is not computed."""
    header = bytearray(TarInfo("").tobuf())
    header[SIZE], header[CHECKSUM] = bytes(12), BLANKS
    return bytes(header)


TEMPLATE = template()
TEMPLATE_SUM = sum(TEMPLATE)


class Writable(Protocol):
    """What a tar is written to."""

    def write(self, data: bytes, /) -> int: ...


class UnusualTar(Exception):
    """A tar, or what is left of one, that only a general reader understands."""


def plain_samples(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The samples of a tar (`__key__`, and suffix -> bytes), from where the file stands.

    Raises:
        UnusualTar: before the sample that it concerns.
    """
    sample: dict[str, Any] = {}
    for name, data in plain_members(file):
        key, dot, suffix = name.partition(".")
        if not dot or "/" in name:
            raise UnusualTar
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        if suffix in sample:
            raise UnusualTar
        sample.setdefault("__key__", key)
        sample[suffix] = data
    if sample:
        yield sample


def plain_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member."""
    while True:
        header = file.read(BLOCK)
        if header == END:
            return
        is_plain = header[156:157] == PLAIN_FILE and header[257:262] == b"ustar"
        if len(header) < BLOCK or not is_plain or header[345]:
            raise UnusualTar
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[124:136].rstrip(b"\0 "), 8)
        except ValueError as error:
            raise UnusualTar from error
        data = file.read(size + -size % BLOCK)
        if len(data) < size:
            raise UnusualTar
        yield name, data[:size]


class PlainTarWriter:
    """Writes what `plain_samples` reads: byte for byte what webdataset's TarWriter does with
    `mtime=0, user="", group="", mode=0o644`, in a fifth of its time."""

    def __init__(self, file: Writable) -> None:
        self.file = file
        self.num_bytes = 0

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: by suffix, the content of each of its files."""
        for suffix in sorted(members):
            data = members[suffix]
            member = header_of(f"{key}.{suffix}", len(data)) + data + bytes(-len(data) % BLOCK)
            self.file.write(member)
            self.num_bytes += len(member)

    def close(self) -> None:
        """Write what ends a tar."""
        num_bytes = 2 * BLOCK
        num_bytes += -(self.num_bytes + num_bytes) % RECORDSIZE
        self.file.write(bytes(num_bytes))


def header_of(name: str, size: int) -> bytes:
    """The block before a file; more than one for a name or a size that does not fit."""
    encoded = name.encode()
    if len(encoded) > LENGTH_NAME or size >= MOST_BYTES or not name.isascii():
        info = TarInfo(name)
        info.size = size
        return info.tobuf()
    header = bytearray(TEMPLATE)
    header[: len(encoded)] = encoded
    header[SIZE] = b"%011o\0" % size
    header[CHECKSUM] = b"%06o\0 " % (TEMPLATE_SUM + sum(encoded) + sum(header[SIZE]))
    return bytes(header)
