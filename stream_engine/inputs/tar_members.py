"""The members of a tar in order, through concatenated archives and over damaged headers."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from stream_engine.inputs.unread import Unreadable

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
MAGIC = b"ustar"
MAGIC_OFFSET = 257


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

    @property
    def is_side_file(self) -> bool:
        """Whether macOS's tar put it there: "._a.jpg" beside "a.jpg", and the like."""
        folder, _, base = self.name.rpartition("/")
        return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folder.split("/")


class CutError(Unreadable):
    """The tar ends before its end mark."""


class RestError(CutError):
    """What follows an archive's end mark cannot be read; all before it is whole."""


def tar_members(stream: BinaryIO) -> Iterator[Member]:
    """The members of all archives in a stream. Their content is to be read before the next.

    Raises:
        Unreadable: when the stream is no tar.
        CutError: when the last archive has no end mark; RestError: when it has one.
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
        try:
            found = next_header(stream, block)
        except Unreadable as error:
            if is_damaged:
                raise CutError(str(error)) from error
            raise RestError(f"behind the end of an archive: {error}") from error
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
    """Where the next header begins, from the block that was just read; None: nowhere.

    An archive that was joined to another may begin anywhere; its header is told by its magic.
    """
    position, before = stream.tell() - BLOCK, b""
    while block:
        if len(block) == BLOCK and block != ZEROS and is_header(block):
            return position
        window = before + block
        magic = window.find(MAGIC)
        while magic >= 0:
            start = magic - MAGIC_OFFSET
            if start >= 0 and is_header(window[start : start + BLOCK]):
                return position - len(before) + start
            magic = window.find(MAGIC, magic + 1)
        position += len(block)
        before, block = block, stream.read(BLOCK)
    return None


def is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
