"""Files of a run by name, on a disk or in an object store: what all other rooms call.

See base.py for what is promised. A name is a `Path`, or an `ObjectPath` for a URL.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from stream_engine.errors import ChangedError, ConfigError
from stream_engine.store import local
from stream_engine.store.base import (
    Entry,
    Location,
    ObjectPath,
    Spool,
    Store,
    Version,
    Wanted,
    all_names,
)
from stream_engine.store.local import LocalStore, temporary_path
from stream_engine.store.objects import SCHEMES, is_object_url, object_path, object_store
from stream_engine.text import home_in

LOCAL = LocalStore()


def location(path: str | Location, *, setting: str = "path") -> Location:
    """The name that a setting gives.

    Raises:
        ConfigError: for a URL of a kind that cannot be written to.
    """
    if isinstance(path, (Path, ObjectPath)):
        return path
    if is_object_url(path):
        return object_path(path)
    if "://" in path:
        raise ConfigError(
            f"{setting} {path!r} is a URL that cannot be written to; give a folder, or one of "
            f"{', '.join(SCHEMES)}"
        )
    return Path(home_in(path))


def store_of(path: Location) -> Store:
    """Where a file lies."""
    return object_store(path.root) if isinstance(path, ObjectPath) else LOCAL


def trust(folder: Location) -> None:
    """Say that another process has reached where a folder lies: what fails there now passes, and
    is waited for from the first request on."""
    if isinstance(folder, ObjectPath):
        object_store(folder.root).is_reached = True


def read(path: Location) -> tuple[bytes, Entry] | None:
    """A file's content, and what it is; None when it is absent."""
    return store_of(path).read(path)


def read_bytes(path: Location) -> bytes | None:
    """A file's content; None when it is absent."""
    found = read(path)
    return None if found is None else found[0]


def stat(path: Location) -> Entry | None:
    """What a file is; None when it is absent."""
    return store_of(path).stat(path)


def exists(path: Location) -> bool:
    """Whether there is a file of that name."""
    return stat(path) is not None


def version_of(path: Location) -> Version | None:
    """A file's version; None when it is absent."""
    entry = stat(path)
    return None if entry is None else entry.version


def list_files(folder: Location, *, wanted: Wanted = all_names) -> list[Entry]:
    """The files that lie in a folder, by name; temporary ones are not told.

    Args:
        wanted: says by its name whether a file is told. On a disk the others are not looked at,
            which on a network file system is a request for each.
    """
    return store_of(folder).list_files(folder, wanted)


def list_folders(folder: Location) -> list[Location]:
    """The folders that lie in a folder, by name."""
    return store_of(folder).list_folders(folder)


def read_ends(file: Location | Entry, *, head: int, tail: int) -> tuple[bytes, bytes, int]:
    """The first and the last bytes of a file, so many of each at most, and how many it has.

    Of a file that was listed the entry will do: of many, making their paths takes longer.

    Raises:
        FileNotFoundError: when it is absent.
    """
    folder = file.folder if isinstance(file, Entry) else file
    return store_of(folder).read_ends(file, head, tail)


def open_file(path: Location) -> BinaryIO:
    """A file to read from, at any place.

    Raises:
        FileNotFoundError: when it is absent.
    """
    return store_of(path).open(path)


def spool(folder: Location) -> Spool:
    """A file in the making for that folder; see Spool.publish."""
    return store_of(folder).spool(folder)


def create(path: Location, data: bytes, *, durable: bool = True) -> Version:
    """Write a file where there is none of that name.

    Raises:
        ChangedError: when there is one.
    """
    return replace(path, data, None, durable=durable)


def replace(
    path: Location, data: bytes, version: Version | None, *, durable: bool = True
) -> Version:
    """Write a file over the version of it that was read (None: it was absent).

    Raises:
        ChangedError: when it is another by now; nothing was done.
        IsADirectoryError: when a folder stands there.
    """
    with spool(path.parent) as new:
        new.file.write(data)
        try:
            return new.publish(path, version, durable=durable)
        except ChangedError:
            if isinstance(path, Path) and path.is_dir():
                what = "a folder stands where this file belongs: take it away"
                raise IsADirectoryError(errno.EISDIR, what, str(path)) from None
            raise


def remove(path: Location, version: Version, *, durable: bool = True) -> None:
    """Take a file away if it is still that version.

    Raises:
        ChangedError: when it is not.
    """
    replace(path, b"", version, durable=durable)


def take(source: Path, path: Location) -> None:
    """Move a file of this machine to its name; where that is local, of the same file system.

    Only for a name that stands for one content: what is there is the same, or damaged.
    """
    store_of(path).take(source, path)


def erase(path: Location) -> None:
    """Take a file away whatever it is: only for a name that is never used again."""
    store_of(path).erase(path)


@contextmanager
def scratch_folder(folder: Location) -> Iterator[Path]:
    """A folder of this machine whose files `take` can move to `folder`; removed at the end."""
    if isinstance(folder, ObjectPath):
        with TemporaryDirectory(prefix="stream-engine-") as name:
            yield Path(name)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    scratch = temporary_path(folder)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: Location) -> None:
    """Delete what killed processes left beside a folder, scratch folders among that."""
    if isinstance(folder, Path):
        local.remove_leftovers(folder.parent)


def now(folder: Location) -> float:
    """The time by the clock that stamps files in that folder, in seconds since the epoch."""
    return store_of(folder).now(folder)
