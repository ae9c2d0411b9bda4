"""What a store offers: bytes by name, each with a version that no other content of it ever has.

A file is published in one of two ways: `create`, only if there is none of that name, and `replace`,
only if it is still the version that was read. So a process that was stopped for hours and wakes up
can overwrite nothing. There is no plain delete, since none can be made conditional on a disk or in
every object store: to remove a file is to replace it by an empty one, and **an empty file counts as
absent** everywhere.

What is written is whole or not there: a reader never sees a part.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Protocol

Version = str


class ObjectPath:
    """A name in an object store, `s3://bucket/folder/name`, taken apart and joined as a Path is."""

    __slots__ = ("_hash", "key", "root")

    def __init__(self, root: str, key: str = "") -> None:
        """`root` is scheme and bucket; `key` has no slash at its ends."""
        self.root = root
        self.key = key
        self._hash = hash((root, key))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def suffix(self) -> str:
        _, dot, suffix = self.name.rpartition(".")
        return dot + suffix if dot else ""

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.root, f"{self.key}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return self._hash


Location = Path | ObjectPath


Wanted = Callable[[str], bool]
"""Whether a listing tells of a file of that name."""


def all_names(name: str) -> bool:
    return True


class Entry(NamedTuple):
    """A file as it is now."""

    folder: Location
    name: str
    version: Version
    size: int
    modified: float
    """Seconds since the epoch, by the store's own clock."""

    @property
    def path(self) -> Location:
        return self.folder / self.name


def absent(path: Location) -> FileNotFoundError:
    """The error of opening a file that is not there, or was removed."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


class Spool(ABC):
    """A file in the making, which nobody sees until it is published. Leaving its block drops it."""

    file: BinaryIO

    @abstractmethod
    def publish(
        self, path: Location, version: Version | None = None, *, durable: bool = True
    ) -> Version:
        """Put the file at `path`, over that version of it, or (None) where there is none.

        `durable` says that it must outlast a power cut from now on.

        Raises:
            ChangedError: when `path` is another version now; nothing was done.
        """

    @abstractmethod
    def drop(self) -> None:
        """Remove what is not published."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.drop()


class Store(Protocol):
    """What the functions in files.py ask of a local disk or an object store."""

    def read(self, path: Location) -> tuple[bytes, Entry] | None:
        """A file's content and what it is; None when it is absent."""

    def stat(self, path: Location) -> Entry | None:
        """What a file is; None when it is absent."""

    def list_files(self, folder: Location, wanted: Wanted = all_names) -> list[Entry]:
        """The files that lie in a folder, by name; names that begin with a dot are not told."""

    def list_folders(self, folder: Location) -> list[Location]:
        """The folders that lie in a folder, by name, but for those whose name begins with a dot."""

    def read_ends(self, file: Location | Entry, head: int, tail: int) -> tuple[bytes, bytes, int]:
        """The first and the last bytes of a file, so many of each at most, and how many it has.

        Raises FileNotFoundError."""

    def open(self, path: Location) -> BinaryIO:
        """A file to read from, at any place. Raises FileNotFoundError."""

    def spool(self, folder: Location) -> Spool:
        """A new file for that folder."""

    def take(self, source: Path, path: Location) -> None:
        """Move a file of this machine to a name that stands for one content: what is there is the
        same, or damaged."""

    def erase(self, path: Location) -> None:
        """Take a file away for good, whatever it is now: for names that are never used again."""

    def now(self, folder: Location) -> float:
        """The time by the clock that stamps files in that folder."""
