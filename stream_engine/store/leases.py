"""Leases: which worker holds what, kept in files, so that workers meet in a directory only.

A lease is a file that `os.link` creates exclusively; its holder touches it every timeout / 6. It is
stale when nobody touched it for `timeout_s` by the file system's own clock, or when its holder ran
in this very operating system and is gone.

Ending a lease, by release or take-over, is a right that is given out once: whoever links the file
`.<name>.<token>.0.end` may end the lease with that token, and nobody else. Should that one die in
between, the next contender links `.1.end`, and so on. The file's content says who holds the lease;
`verify` reads it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from stream_engine.errors import LeaseLostError
from stream_engine.store.atomic import is_gone, temporary_path

BEATS_PER_TIMEOUT = 6
PROC = Path("/proc")


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a lease file: which process holds it, and since when."""

    token: str
    worker_id: str
    host: str
    pid: int
    system: str
    """Kernel boot and process namespace: pids can be compared only where this is equal."""
    process_start: str
    """The kernel's start time of the process, since pids are used again."""
    started: float
    timeout_s: float


class LeaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as `status` shows it; `is_alive` is None when its process cannot be seen."""

    name: str
    worker_id: str
    host: str
    pid: int
    started: float
    age_s: float
    """Seconds since the last heartbeat."""
    is_alive: bool | None
    is_stale: bool


class Lease:
    """An exclusive, renewed claim on a name. Made by `acquire`; also a context manager."""

    def __init__(
        self, path: Path, holder: Holder, descriptor: int, taken_from: Holder | None
    ) -> None:
        """`taken_from` is the holder that ended, or fell silent, without giving the lease back."""
        self.path = path
        self.name = path.stem
        self.holder = holder
        self.taken_from = taken_from
        self._descriptor = descriptor
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease-{self.name}", daemon=True)
        self._heart.start()

    @classmethod
    def acquire(cls, folder: Path, name: str, *, worker_id: str, timeout_s: float) -> Lease | None:
        """Take the lease if it is free or stale; None when somebody else holds it."""
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = this_process(worker_id, timeout_s)
        with ExitStack() as stack:
            with claim_file(path, holder) as claim:
                # Touched through its own inode: a successor's file is never refreshed by mistake.
                descriptor = os.open(claim, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                is_ours, taken_from = claim_name(path, claim, timeout_s)
            if not is_ours:
                return None
            # Its heart beats only now: a lease whose taking failed half way falls silent.
            stack.pop_all()
            return cls(path, holder, descriptor, taken_from)

    def verify(self) -> None:
        """Check that the lease is still held.

        Raises:
            LeaseLostError: when it was taken over, or its file is gone.
        """
        current = read_lease(self.path)
        if self._stop.is_set() or current is None or current[0].token != self.holder.token:
            to = f" to {current[0].worker_id}" if current else ""
            raise LeaseLostError(f"lease {self.name} was lost{to}: {self.path}")
        self._touch()

    def release(self) -> None:
        """Give the lease back; does nothing when it is no longer held."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._heart.join()
        os.close(self._descriptor)
        with claim_file(self.path, self.holder) as claim:
            now = claim.stat().st_mtime
            with right_to_end(self.path, self.holder.token, claim, now, 0.0) as ok:
                if ok:
                    self.path.unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self.holder.timeout_s / BEATS_PER_TIMEOUT):
            self._touch()

    def _touch(self) -> None:
        # A failed touch is not fatal: verify() is what decides.
        with suppress(OSError):
            os.utime(self._descriptor)


def list_leases(folder: Path) -> list[LeaseInfo]:
    """All leases in a folder, sorted by name."""
    if not folder.is_dir():
        return []
    now = file_system_time(folder)
    infos = []
    for path in sorted(folder.glob("[!.]*.json")):
        current = read_lease(path)
        if current is None:
            continue
        holder, touched = current
        infos.append(
            LeaseInfo(
                name=path.stem,
                worker_id=holder.worker_id,
                host=holder.host,
                pid=holder.pid,
                started=holder.started,
                age_s=max(0.0, now - touched),
                is_alive=is_alive(holder),
                is_stale=is_stale(holder, touched, now),
            )
        )
    return infos


def is_stale(holder: Holder, touched: float, now: float, timeout_s: float = 0.0) -> bool:
    """Whether a lease touched at that time may be taken over.

    The longer of both timeouts counts: the holder's says how often it promised to beat.
    """
    return is_alive(holder) is False or now - touched > max(timeout_s, holder.timeout_s)


def is_alive(holder: Holder) -> bool | None:
    """Whether the holder's process runs; None when it cannot be seen from this system."""
    if not holder.system or holder.system != system_identity():
        return None
    start = process_start(holder.pid)
    if start is not None:
        return start == holder.process_start
    try:
        os.kill(holder.pid, 0)  # sends nothing: /proc may hide other users' processes
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None


def this_process(worker_id: str, timeout_s: float) -> Holder:
    """A new holder: this process, with a fresh token."""
    return Holder(
        token=uuid.uuid4().hex,
        worker_id=worker_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        system=system_identity(),
        process_start=process_start(os.getpid()) or "",
        started=time.time(),
        timeout_s=timeout_s,
    )


def system_identity() -> str:
    """Boot id and process namespace of this system; empty where there is no /proc."""
    try:
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}/{os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """The kernel's start time of a process; empty for a zombie, None when there is none to see."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def read_lease(path: Path) -> tuple[Holder, float] | None:
    """Holder and time of the last heartbeat; None when the file is gone.

    The file is opened before its times are read: a network file system then asks its server.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            content = file.read()
    except OSError as error:
        if is_gone(error):
            return None
        raise
    try:
        return msgspec.json.decode(content, type=Holder), stat.st_mtime
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Only a crash of the whole system leaves this; it goes stale like any other.
        token = f"damaged-{stat.st_ino}"
        unknown = Holder(
            token=token,
            worker_id="unknown",
            host="unknown",
            pid=0,
            system="",
            process_start="",
            started=stat.st_mtime,
            timeout_s=0.0,
        )
        return unknown, stat.st_mtime


@contextmanager
def claim_file(path: Path, holder: Holder) -> Iterator[Path]:
    """A temporary file with the holder's data, ready to be linked to a name."""
    claim = temporary_path(path)
    claim.write_bytes(msgspec.json.encode(holder))
    try:
        yield claim
    finally:
        claim.unlink(missing_ok=True)


def link_exclusively(claim: Path, name: Path) -> bool:
    """Give the claim a second name unless that name is taken."""
    links = claim.stat().st_nlink
    try:
        os.link(claim, name)
    except FileExistsError:
        # On NFS the answer to a link that did happen can get lost and the retry then fails.
        return claim.stat().st_nlink > links
    return True


def claim_name(path: Path, claim: Path, timeout_s: float) -> tuple[bool, Holder | None]:
    """Make the claim the lease at `path` if that is free or stale; False when it is held.

    Beside it stands the holder of the stale lease, if there was one.
    """
    now = claim.stat().st_mtime
    while not link_exclusively(claim, path):
        current = read_lease(path)
        if current is None:
            continue  # released just now
        holder, touched = current
        if not is_stale(holder, touched, now, timeout_s):
            return False, None
        with right_to_end(path, holder.token, claim, now, timeout_s) as ok:
            if ok:
                os.replace(claim, path)
            return ok, holder
    return True, None


@contextmanager
def right_to_end(
    path: Path, token: str, claim: Path, now: float, timeout_s: float
) -> Iterator[bool]:
    """Whether this process, alone, may end the lease with that token."""
    rights = [path.with_name(f".{path.stem}.{token}.0.end")]
    while not link_exclusively(claim, rights[-1]):
        current = read_lease(rights[-1])
        if current is None or not is_stale(*current, now, timeout_s):
            yield False
            return
        rights.append(path.with_name(f".{path.stem}.{token}.{len(rights)}.end"))
    try:
        lease = read_lease(path)
        yield lease is not None and lease[0].token == token
    finally:
        for right in reversed(rights):
            right.unlink(missing_ok=True)


def file_system_time(folder: Path) -> float:
    """Now, by the clock that stamps files in this folder; this machine's where it is read-only."""
    probe = temporary_path(folder / "clock")
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    except OSError:
        return time.time()
