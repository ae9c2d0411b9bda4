"""A folder that appears whole: filled under a temporary name, then swapped in."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from stream_engine.errors import ConfigError
from stream_engine.store.local import fsync_folder
from stream_engine.store.processes import is_running

ABANDONED_AFTER_S = 3600.0


class FolderSwap:
    """Fill `new`, then `commit`. Without a commit, leaving the block removes `new`.

    `folder` is as it was until the commit. What a killed process left is removed when its process
    is known to be gone, or after an hour.

    Raises:
        ConfigError: when `folder` holds files that are not ours.
    """

    def __init__(self, folder: Path, is_ours: Callable[[Path], bool]) -> None:
        """`is_ours` says of a folder with files whether it may be replaced."""
        self.folder = folder
        self.is_ours = is_ours
        self.new = self._name("new")

    def _name(self, kind: str) -> Path:
        owner = f"{this_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        return self.folder.with_name(f".{self.folder.name}.{owner}.{kind}.tmp")

    def __enter__(self) -> FolderSwap:
        if holds_other_files(self.folder) and not self.is_ours(self.folder):
            raise ConfigError(f"{self.folder} holds other files; name a new or empty folder")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.folder)
        self.new.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.new, ignore_errors=True)

    def commit(self) -> None:
        """Put the new folder in the old one's place."""
        fsync_folder(self.new)
        old = self._name("old")
        if self.folder.exists():
            os.rename(self.folder, old)
        os.rename(self.new, self.folder)
        fsync_folder(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def holds_other_files(folder: Path) -> bool:
    """Whether something is there that a swap would destroy."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of this folder, beside it."""
    for path in folder.parent.glob(f".{folder.name}.*-*-*.*.tmp"):
        host, pid, _ = path.name.split(".")[-3].split("-")
        is_gone = host == this_host() and not is_running(int(pid))
        if is_gone or time.time() - newest_mtime(path) > ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


def this_host() -> str:
    """This machine, in eight hex digits: names may hold anything."""
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def newest_mtime(folder: Path) -> float:
    """When anything in the folder was last written to."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return time.time()
