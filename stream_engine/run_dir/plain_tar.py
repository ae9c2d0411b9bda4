"""Tars as a shard's writer makes them: plain files of short names, one sample's side by side.

They are read block by block, without a general reader of tars (an eighth of its time, and without
importing torch, which webdataset does). What is not of that kind is refused: see shards.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

BLOCK = 512
END = bytes(BLOCK)
PLAIN_FILE = b"0"


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
