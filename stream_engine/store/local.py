"""A disk, or a file system that several machines mount: published by hard links and renames.

A file is written under a temporary name in its folder, flushed, and put in place:

- `create` links it to the name, which fails where the name is taken;
- `replace` has no such call, so it is a protocol without locks. Whoever wants to replace version v
  makes the symbolic link `.<name>.<v>.<n>.claim` to its temporary file, which one process alone
  can; then, if the file is still v, it renames the temporary file to the name. Others who want to
  replace v find the claim, finish it in the same way, and are told that the file has changed. A
  process that stops at any point is thus finished by the next one, and when it wakes up its own
  rename fails, since that temporary file is gone. A claim whose temporary file was lost (power
  cut) is passed over by the next number.

A version is inode, time of change and size. Times are set to the file system's own time of writing
with random digits at the end, so that no two contents of a name have the same.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
import uuid
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from stream_engine.errors import ChangedError
from stream_engine.store.base import Entry, Location, Spool, Version, Wanted, absent, all_names
from stream_engine.store.processes import is_running, this_system

RANDOM_NS = 1 << 20
"""The time of change is drawn from the millisecond before the true one."""
LEFTOVER_S = 86_400.0
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK))
REMEDY = (
    "files are put in place by hard and symbolic links, which this file system may not have; give "
    "a --work_dir on another (ext4, xfs, NFS, Lustre), or in object storage (s3://bucket/run)"
)


class LocalStore:
    """Files below any folder of this machine."""

    def read(self, path: Location) -> tuple[bytes, Entry] | None:
        try:
            with open(local(path), "rb") as file:
                entry = entry_of(path.parent, path.name, os.fstat(file.fileno()))
                return (file.read(), entry) if entry.size else None
        except OSError as error:
            if is_gone(error):
                return None
            raise

    def stat(self, path: Location) -> Entry | None:
        entry = stat_even_if_empty(local(path))
        return entry if entry is not None and entry.size else None

    def list_files(self, folder: Location, wanted: Wanted = all_names) -> list[Entry]:
        entries = []
        for found in scan(local(folder)):
            try:
                if wanted(found.name) and found.is_file():
                    entry = entry_of(folder, found.name, found.stat())
                    entries += [entry] if entry.size else []
            except OSError as error:
                if not is_gone(error):
                    raise
        return sorted(entries, key=lambda entry: entry.name)

    def list_folders(self, folder: Location) -> list[Location]:
        names = sorted(found.name for found in scan(local(folder)) if found.is_dir())
        return [folder / name for name in names]

    def read_ends(self, file: Location | Entry, head: int, tail: int) -> tuple[bytes, bytes, int]:
        address = f"{file.folder}/{file.name}" if isinstance(file, Entry) else str(file)
        descriptor = os.open(address, os.O_RDONLY)  # a third of what a file object takes
        try:
            size = os.fstat(descriptor).st_size
            if not size:
                raise absent(Path(address))
            first = os.pread(descriptor, head, 0)
            is_all = len(first) == size
            return first, first[-tail:] if is_all else os.pread(descriptor, tail, size - tail), size
        finally:
            os.close(descriptor)

    def open(self, path: Location) -> BinaryIO:
        file = open(local(path), "rb")  # noqa: SIM115  the caller closes it
        if not os.fstat(file.fileno()).st_size:
            file.close()
            raise absent(path)
        return file

    def spool(self, folder: Location) -> Spool:
        return LocalSpool(local(folder))

    def take(self, source: Path, path: Location) -> None:
        target = local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            finish(source, durable=True)
            os.replace(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy = temporary_path(target)  # the folder is a link to another disk
            shutil.copyfile(source, copy)
            finish(copy, durable=True)
            os.replace(copy, target)
        fsync_folder(target.parent)

    def erase(self, path: Location) -> None:
        local(path).unlink(missing_ok=True)

    def now(self, folder: Location) -> float:
        """This machine's own where the folder is read-only."""
        probe = temporary_path(local(folder) / "clock")
        try:
            probe.touch()
            try:
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)
        except OSError:
            return time.time()


class LocalSpool(Spool):
    """A temporary file, which a killed process leaves behind and listings pass over."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.temporary = temporary_path(folder / "spool")
        self.file = open(self.temporary, "w+b")  # noqa: SIM115  closed by publish or drop
        self.is_claimed = False

    def publish(
        self, path: Location, version: Version | None = None, *, durable: bool = True
    ) -> Version:
        target = local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.file.close()
        try:
            return self.place(target, version, durable=durable)
        except OSError as error:
            if error.errno in NO_LINKS:
                said = f"{error.strerror}: {REMEDY}"
                raise OSError(error.errno, said, str(target)) from error
            raise

    def place(self, target: Path, version: Version | None, *, durable: bool) -> Version:
        """Put the finished file in place."""
        new = finish(self.temporary, durable=durable)
        if version is not None or not create(self.temporary, target):
            version = version if version is not None else version_of_removed(target)
            self.is_claimed = True  # from here on whoever comes may finish it
            self.is_claimed = replace(self.temporary, target, version)
            if not self.is_claimed:
                raise ChangedError(target)
        if durable:
            fsync_folder(target.parent)
        return new

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Name the folder where there was no room: the system does not, of a file that is open."""
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            error.filename = str(self.temporary.parent)
        self.drop()

    def drop(self) -> None:
        with suppress(OSError):  # on a full disk, of what was not written yet
            self.file.close()
        if not self.is_claimed:
            with suppress(OSError):
                self.temporary.unlink()


def finish(temporary: Path, *, durable: bool) -> Version:
    """Give a temporary file the version that it will have, and (durable) flush it."""
    with open(temporary, "rb") as file:
        stamp(file.fileno())
        if durable:
            os.fsync(file.fileno())
        return version_of(os.fstat(file.fileno()))


def create(temporary: Path, target: Path) -> bool:
    """Give a file its name; False when that is taken."""
    if not link_exclusively(temporary, target):
        return False
    with suppress(OSError):
        temporary.unlink()
    return True


def version_of_removed(path: Path) -> Version:
    """The version of the empty file that stands for a removed one.

    Raises:
        ChangedError: when there is a file.
    """
    entry = stat_even_if_empty(path)
    if entry is None or entry.size:
        raise ChangedError(path)
    return entry.version


def replace(temporary: Path, path: Path, version: Version) -> bool:
    """Put a temporary file over that version of `path`; False when it is another by now."""
    for number in count():
        claim = path.with_name(f".{path.name}.{version}.{number}.claim")
        target = claimed(claim, temporary)
        if target is None:
            return False  # settled and cleared since
        is_ours = target == temporary.name
        was_there = os.path.lexists(path.with_name(target))
        if current_version(path) != version:
            # One that was published left its temporary name; ours that still has it was not.
            is_done = is_ours and not os.path.lexists(temporary)
            clear_claims(path, version, number)
            return is_done
        if not was_there and is_ours:
            raise FileNotFoundError(errno.ENOENT, "a temporary file was removed", str(temporary))
        if not was_there:
            continue  # its file was lost in a power cut, and nobody can ever put it in place
        with suppress(FileNotFoundError):  # another process has put it in place
            os.rename(path.with_name(target), path)
        clear_claims(path, version, number)
        return is_ours
    raise AssertionError


def claimed(claim: Path, temporary: Path) -> str | None:
    """The temporary file that holds a claim: this one, if the claim was free.

    None when the claim was there and is gone.
    """
    try:
        os.symlink(temporary.name, claim)
    except FileExistsError:
        try:
            return os.readlink(claim)
        except FileNotFoundError:
            return None
    return temporary.name


def clear_claims(path: Path, version: Version, number: int) -> None:
    """Remove the claims on a version that is past; nobody can use them any more."""
    if current_version(path) == version:
        return
    for i in range(number + 1):
        with suppress(OSError):
            path.with_name(f".{path.name}.{version}.{i}.claim").unlink()


def current_version(path: Path) -> Version | None:
    """A file's version, asked of the file server: opening a file has its attributes read anew."""
    try:
        with open(path, "rb") as file:
            return version_of(os.fstat(file.fileno()))
    except OSError as error:
        if is_gone(error):
            return None
        raise


def stat_even_if_empty(path: Path) -> Entry | None:
    """A file as it is, removed ones included; None where there never was one."""
    try:
        return entry_of(path.parent, path.name, os.stat(path))
    except OSError as error:
        if is_gone(error):
            return None
        raise


def entry_of(folder: Location, name: str, status: os.stat_result) -> Entry:
    return Entry(folder, name, version_of(status), status.st_size, status.st_mtime)


def version_of(status: os.stat_result) -> Version:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def stamp(descriptor: int) -> None:
    """Give a file a time of change that no other has."""
    written = os.fstat(descriptor).st_mtime_ns
    drawn = written - written % RANDOM_NS + random.SystemRandom().randrange(RANDOM_NS) - RANDOM_NS
    os.utime(descriptor, ns=(written, drawn))


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder under a name of its own; nothing where there is no folder."""
    try:
        with os.scandir(folder) as found:
            return [one for one in found if not one.name.startswith(".")]
    except OSError as error:
        if is_gone(error):
            return []
        raise


def local(path: Location) -> Path:
    assert isinstance(path, Path), path
    return path


def temporary_path(path: Path) -> Path:
    """A fresh temporary name beside `path`, which tells this process."""
    owner = f"{this_system()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def is_gone(error: OSError) -> bool:
    """Whether a file is not there (any more).

    A network file system answers ESTALE where a file that was opened is deleted or replaced since.
    A link that leads to itself is no file either.
    """
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP)


def is_temporary(path: str | Path) -> bool:
    """Whether a name is one of ours that a killed process may have left."""
    name = Path(path).name
    return name.startswith(".") and name.endswith((".tmp", ".claim"))


def remove_leftovers(folder: Path) -> int:
    """Delete what killed processes left in a folder; returns how many files.

    A temporary file goes when its process is known to be gone, else after a day: a process that
    was only stopped still wants it. A claim goes when its version is past.
    """
    removed = 0
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    oldest_kept = time.time() - LEFTOVER_S
    for path in (folder / name for name in names if is_temporary(name)):
        with suppress(FileNotFoundError):
            is_past = is_past_claim if path.name.endswith(".claim") else is_abandoned
            if is_past(path) or path.lstat().st_mtime <= oldest_kept:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
                removed += 1
    return removed


def is_past_claim(claim: Path) -> bool:
    """Whether a claim is on a version that its file no longer has."""
    name, version = claim.name.removeprefix(".").rsplit(".", 3)[:2]
    return current_version(claim.with_name(name)) != version


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file's process ran on this system and is gone."""
    system, _, rest = path.name.split(".")[-2].partition("-")
    pid = rest.partition("-")[0]
    if system != this_system() or not pid.isdecimal():
        return False
    return not is_running(int(pid))


def link_exclusively(temporary: Path, name: Path) -> bool:
    """Give a file a second name unless that name is taken."""
    links = temporary.stat().st_nlink
    try:
        os.link(temporary, name)
    except FileExistsError:
        # On NFS the answer to a link that did happen can get lost and the retry then fails.
        return temporary.stat().st_nlink > links
    return True


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
