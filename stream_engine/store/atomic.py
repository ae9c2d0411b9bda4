"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the folder.

A temporary file lies beside its target and is named `.<target>.<random>.tmp`; a killed process
leaves it behind, and every listing skips such names.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends without an error.

    The folder is made if it is missing. After an error `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data`, at once and durably."""
    with atomic_writer(path) as file:
        file.write(data)


def temporary_path(path: Path) -> Path:
    """A fresh temporary name beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def is_gone(error: OSError) -> bool:
    """Whether a file is not there (any more).

    A network file system answers ESTALE where a file that was opened is deleted or replaced since.
    """
    return error.errno in (errno.ENOENT, errno.ESTALE)


def read_if_there(path: Path) -> bytes | None:
    """The bytes of a file that others may delete; None when it is gone."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if is_gone(error):
            return None
        raise


def stat_if_there(path: Path) -> os.stat_result | None:
    """The stat of a file that others may delete; None when it is gone."""
    try:
        return os.stat(path)
    except OSError as error:
        if is_gone(error):
            return None
        raise


def is_temporary(path: str | Path) -> bool:
    """Whether a name is one of ours that a killed process may have left."""
    name = Path(path).name
    return name.startswith(".") and name.endswith(".tmp")


def remove_leftovers(folder: Path, *, older_than_s: float = 3600.0) -> int:
    """Delete temporary files that nobody has written to for that long; returns how many."""
    if not folder.is_dir():
        return 0
    removed = 0
    oldest_kept = time.time() - older_than_s
    for path in folder.iterdir():
        if is_temporary(path):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime <= oldest_kept:
                    path.unlink()
                    removed += 1
    return removed


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
