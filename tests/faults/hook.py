"""Sees every change of a file below a folder, and at the n-th of them does harm.

`Hook(root, ...).install()` wraps what Python code changes files with: the functions of `os`, the
built-in `open` and what is written through it, and the files that pyarrow opens by name. The code
under test looks these up when it calls them, and nothing beneath the work directory is written by
other means (a tar goes through our own file object, sqlite lies in the temporary folder). So each
change is seen once, in its order, as a preloaded C library would see it; test_hook.py holds it
against strace.

What it does not see: functions that were taken from `os` before it was installed
(`from os import link`, and pathlib of Python 3.10), changes through mmap, those of native code
that opens files itself (but for pyarrow's), and those of processes that are started. The kernel is
the real one: an error is raised instead of the call.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

Deed = Literal["none", "record", "kill", "stop", "eio", "enospc"]
CODES = {"eio": errno.EIO, "enospc": errno.ENOSPC}


class Change(NamedTuple):
    """One change: its call, the path below the root, and what a replay needs of it."""

    call: str
    path: str
    inode: int = 0
    offset: int = 0
    """Of a write; the size of a truncate; the nanoseconds of a utime."""
    data: bytes = b""
    target: str = ""
    """The second path of a link or rename; what a symlink holds."""


class Hook:
    """Counts changes below `root`; the n-th (`at`, from 1) is met with `deed`."""

    def __init__(self, root: Path, *, at: int = 0, deed: Deed = "none", told: Path) -> None:
        """`told` is a file outside of the root that gets what was met, before the deed."""
        self.root = os.path.realpath(root) + "/"
        self.at = at
        self.deed = deed
        self.changes: list[Change] = []
        self.count = 0
        self.lock = threading.RLock()
        self.told = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.write = os.write

    def below(self, path: object, folder: int | None = None) -> str | None:
        """The path relative to the root; None when it lies elsewhere."""
        if isinstance(path, int):
            try:
                text = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return None
        else:
            text = os.fsdecode(path)  # type: ignore[arg-type]
            if folder is not None and not text.startswith("/"):
                text = f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"
            text = os.path.abspath(text)
        if text + "/" == self.root:
            return "."
        return text.removeprefix(self.root) if text.startswith(self.root) else None

    def meet(self, call: str, path: str, target: str = "") -> None:
        """Count a change that is about to be made; harm is done here."""
        with self.lock:
            self.count += 1
            if self.count != self.at or self.deed in ("none", "record"):
                return
            self.write(self.told, f"{call} {path} {target}\n".encode())
            if self.deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.deed == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        if code := CODES.get(self.deed):
            raise OSError(code, os.strerror(code), self.root + path)

    def note(self, call: str, path: str, **more: Any) -> None:
        """Record a change that was made."""
        if self.deed == "record":
            with self.lock:
                self.changes.append(Change(call, path, **more))

    def install(self) -> None:
        """From now on, in this process."""
        for name in ("link", "symlink", "rename", "replace"):
            setattr(os, name, self.wrapped_pair(name, getattr(os, name)))
        for name in ("unlink", "remove", "rmdir", "mkdir", "utime", "fsync", "truncate"):
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        os.open = self.wrapped_open(os.open)
        builtins.open = self.file_opener(builtins.open)  # type: ignore[assignment]
        io.open = builtins.open  # type: ignore[assignment]
        wrap_pyarrow(self)

    def wrapped_pair(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """link, symlink, rename and replace: the second path is what is made."""

        def call(source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
            path = self.below(target)
            if path is None:
                return function(source, target, *arguments, **options)
            first = os.fspath(source) if name == "symlink" else self.below(source) or ""
            self.meet(name, path, first)
            result = function(source, target, *arguments, **options)
            self.note("rename" if name == "replace" else name, path, target=first)
            return result

        return call

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Functions of one path, or of a descriptor."""

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            found = self.below(path, options.get("dir_fd"))
            if found is None:
                return function(path, *arguments, **options)
            self.meet(name, found)
            result = function(path, *arguments, **options)
            where = path if isinstance(path, int) else self.root + found
            more: dict[str, Any] = {}
            if name in ("mkdir", "utime", "fsync", "truncate"):
                more["inode"] = os.stat(where).st_ino
            if name == "utime":
                more["offset"] = os.stat(where).st_mtime_ns
            if name == "truncate":
                more["offset"] = os.stat(where).st_size
            self.note({"remove": "unlink"}.get(name, name), found, **more)
            return result

        return call

    def wrapped_open(self, function: Callable[..., int]) -> Callable[..., int]:
        """os.open: making or emptying a file is a change. What os.write does to it is not seen."""

        def call(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            found = self.below(path, options.get("dir_fd"))
            if found is None or not flags & (os.O_CREAT | os.O_TRUNC):
                return function(path, flags, *arguments, **options)
            is_new = not os.path.lexists(self.root + found)
            self.meet("open", found)
            descriptor = function(path, flags, *arguments, **options)
            inode = os.fstat(descriptor).st_ino
            if is_new:
                self.note("create", found, inode=inode)
            elif flags & os.O_TRUNC:
                self.note("truncate", found, inode=inode)
            return descriptor

        return call

    def file_opener(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The built-in open: what is opened for writing writes through SeenFile."""

        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            found = None if isinstance(file, int) else self.below(file)
            if found is None or not set(mode) & set("wax+"):
                return function(file, mode, *arguments, **options)
            raw = SeenFile(self, found, file, mode.replace("b", "").replace("t", ""))
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            encoding = options.get("encoding", "utf-8")
            return io.TextIOWrapper(buffered, encoding=encoding, errors=options.get("errors"))

        return call


class SeenFile(io.FileIO):
    """A file below the root, whose writes are counted."""

    def __init__(self, hook: Hook, path: str, file: Any, mode: str) -> None:
        is_new = not os.path.lexists(file)
        self.hook, self.path = hook, path
        if is_new or "w" in mode:
            hook.meet("open", path)
        super().__init__(file, mode)
        self.inode = os.fstat(self.fileno()).st_ino
        self.appends = "a" in mode
        if is_new:
            hook.note("create", path, inode=self.inode)
        elif "w" in mode:
            hook.note("truncate", path, inode=self.inode)

    def write(self, data: Any) -> int:
        content = bytes(data)
        offset = os.fstat(self.fileno()).st_size if self.appends else self.tell()
        try:
            self.hook.meet("write", self.path)
        except OSError:
            if content[: len(content) // 2]:  # a full disk takes a part
                super().write(content[: len(content) // 2])
            raise
        num_written = super().write(content)
        part = content[:num_written]
        self.hook.note("write", self.path, inode=self.inode, offset=offset, data=part)
        return num_written

    def truncate(self, size: int | None = None) -> int:
        self.hook.meet("truncate", self.path)
        result = super().truncate(size)
        self.hook.note("truncate", self.path, inode=self.inode, offset=result)
        return result


def wrap_pyarrow(hook: Hook) -> None:
    """Have pyarrow write through files of ours."""
    import pyarrow
    import pyarrow.parquet

    os_file, writer = pyarrow.OSFile, pyarrow.parquet.ParquetWriter

    def opened(path: str, mode: str = "r", *arguments: Any) -> Any:
        if "w" in mode and hook.below(path) is not None:
            return pyarrow.PythonFile(open(path, "wb"), mode="w")
        return os_file(path, mode, *arguments)

    class SeenWriter(writer):  # type: ignore[misc,valid-type]
        def __init__(self, where: Any, *arguments: Any, **options: Any) -> None:
            self.seen = None
            if isinstance(where, (str, Path)) and hook.below(where) is not None:
                where = self.seen = open(where, "wb")  # noqa: SIM115
            super().__init__(where, *arguments, **options)

        def close(self) -> None:
            super().close()
            if self.seen is not None:
                self.seen.close()

    pyarrow.OSFile = opened
    pyarrow.parquet.ParquetWriter = SeenWriter


def kind_of(path: str) -> str:
    """What a path below a work directory is, for people and for the choice of a change."""
    name = path.rpartition("/")[2]
    folder = path.partition("/")[0]
    if name.endswith(".tmp") and name.startswith("."):
        return f"{folder} temporary" if "/" in path else "temporary"
    if folder.startswith(".dataset") or folder.startswith(".report"):
        return "scratch"
    if "manifest" in name:
        return "manifest"
    if folder.startswith("dataset"):
        is_rows = name.startswith(("train", "test"))
        return "rows" if is_rows else {"README.md": "card"}.get(name, name)
    return name if folder == path else folder
