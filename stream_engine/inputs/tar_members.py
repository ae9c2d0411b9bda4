"""The members of a tar in order, through concatenated archives and over damaged headers."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from stream_engine.inputs.unread import Unreadable

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)


class Member(NamedTuple):
    """One member, and the number of the archive that it is in. Without a header it is a place
    where a damaged one was passed over: what stood there belongs to a sample beside it."""

    archive: int
    name: str
    header: tarfile.TarInfo | None

    @property
    def is_file(self) -> bool:
        return self.header is not None and self.header.isreg()

    @property
    def is_link(self) -> bool:
        return self.header is not None and (self.header.issym() or self.header.islnk())


class CutError(Unreadable):
    """The tar ends before its end mark."""


def tar_members(stream: BinaryIO) -> Iterator[Member]:
    """The members of all archives in a stream. Their content is to be read before the next.

    Raises:
        Unreadable: when the stream is no tar.
        CutError: when the last archive has no end mark.
    """
    archive, is_first = 0, True
    while True:
        try:
            with tarfile.open(fileobj=stream, mode="r:", errors="replace") as tar:
                while (header := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                    is_first = False
                    yield Member(archive, header.name, header)
                end: int = tar.offset  # type: ignore[attr-defined]
            is_first = False
            stream.seek(end)
            block = stream.read(BLOCK)
        except (tarfile.TarError, Unreadable) as error:
            kind = Unreadable if is_first else CutError
            raise kind(str(error)) from error
        if len(block) < BLOCK:
            raise CutError("the tar has no end mark: it is cut")
        is_damaged = block != ZEROS
        found = next_header(stream, block)
        if found is None:
            if is_damaged:
                yield Member(archive, "", None)
                raise CutError("a damaged header, and no member after it")
            return
        if is_damaged:
            yield Member(archive, "", None)
        else:
            archive += 1
        stream.seek(found)


def next_header(stream: BinaryIO, block: bytes) -> int | None:
    """Where the next header begins, from the block that was just read; None: nowhere."""
    position = stream.tell() - BLOCK
    while len(block) == BLOCK:
        if block != ZEROS and is_header(block):
            return position
        block = stream.read(BLOCK)
        position += BLOCK
    return None


def is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
