"""Leases: which worker holds what, kept in files, so that workers meet in a store only.

A lease is a file that its holder replaces every timeout / 6: each beat is a new version of it. It
is stale when nobody has replaced it for `timeout_s` by the store's own clock, or when its holder
ran in this very operating system and is gone. Where its time lies ahead of that clock (a file
system that stamps with its clients' clocks, a clock that was set back), it is stale when this
process has seen no beat for as long. To take it over is to replace the version that was
found stale, which fails if its holder has beaten since; so of several contenders one alone has it.
Giving it back removes the file.

A holder that was stopped and wakes up finds another version, and holds nothing. `number` grows with
each holder of a name.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from stream_engine.errors import ChangedError, LeaseLostError
from stream_engine.store import files
from stream_engine.store.base import Entry, Location, Version
from stream_engine.store.processes import process_start, system_identity
from stream_engine.timing import spent_on

logger = logging.getLogger(__name__)

BEATS_PER_TIMEOUT = 6
SUFFIX = ".json"
ATTEMPTS = 3
"""To take a lease whose file changes meanwhile; whoever won it is found holding it."""
POLL_S = 0.2
TELL_AFTER_S = 3.0
"""A wait that is longer is told."""
MANY_LEASES = 64
BEATING_S = 10.0
"""Where there are many leases, one that was renewed so lately is taken for held without a look."""
GIVEN_BACK: set[str] = set()
"""Tokens of this process that hold nothing, though a file that could not be changed may say so."""
AHEAD_S = 1.0
"""A lease from further ahead than this was stamped by another clock than the one asked."""
FIRST_SEEN: dict[str, tuple[Version, float]] = {}
"""By their paths, leases from ahead: their version, and when this process first saw that."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a lease file: which process holds it, and since when."""

    token: str
    number: int = 0
    beat: int = 0
    worker_id: str
    host: str
    pid: int
    system: str
    """Kernel boot and process namespace: pids can be compared only where this is equal."""
    process_start: str
    """The kernel's start time of the process, since pids are used again."""
    started: float
    """By the store's clock."""
    timeout_s: float


UNKNOWN = Holder(
    token="",
    worker_id="unknown",
    host="unknown",
    pid=0,
    system="",
    process_start="",
    started=0.0,
    timeout_s=0.0,
)


class LeaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as `status` shows it; `is_alive` is None when its process cannot be seen."""

    name: str
    worker_id: str
    host: str
    pid: int
    held_s: float
    """Seconds since it was taken."""
    age_s: float
    """Seconds since the last heartbeat."""
    is_alive: bool | None
    is_stale: bool
    silent_s: float
    """Without a heartbeat for so many seconds it is taken over."""
    version: Version

    @property
    def is_silent(self) -> bool:
        """Whether beats are missing."""
        return self.age_s >= self.silent_s / 2

    def __str__(self) -> str:
        """Who holds it, and when it will be taken over."""
        silence = f"; silent for {self.age_s:.0f} s, taken over after {self.silent_s:.0f} s"
        if not self.pid:
            return f"whoever wrote the lease {self.name!r}, which does not tell{silence}"
        return (
            f"{self.worker_id} (process {self.pid} of {self.host}), which has held {self.name!r} "
            f"for {self.held_s:.0f} s{silence if self.is_silent else ' and is alive'}"
        )


class Lease:
    """An exclusive, renewed claim on a name. Made by `acquire`; also a context manager."""

    def __init__(
        self, path: Location, holder: Holder, version: Version, taken_from: Holder | None
    ) -> None:
        """`taken_from` is the holder that ended, or fell silent, without giving the lease back."""
        self.path = path
        self.name = path.stem
        self.holder = holder
        self.taken_from = taken_from
        self._version = version
        self._writing = threading.Lock()
        self._is_lost = False
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease-{self.name}", daemon=True)
        self._heart.start()

    @classmethod
    @spent_on("leases")
    def acquire(
        cls, folder: Location, name: str, *, worker_id: str, timeout_s: float
    ) -> Lease | None:
        """Take the lease if it is free or stale; None when somebody else holds it."""
        path = folder / f"{name}{SUFFIX}"
        for _ in range(ATTEMPTS):
            found = files.read(path)
            now = files.now(folder)
            number, before, version = int(now * 1000), None, None
            if found is not None:
                before, version = holder_of(*found), found[1].version
                number = max(before.number + 1, number)
                if before.token in GIVEN_BACK:
                    before = None
                elif not is_stale(before, found[1], now, timeout_s):
                    return None
            holder = this_process(worker_id, timeout_s, number=number, now=now)
            try:
                return cls(path, holder, write(path, holder, version), before)
            except ChangedError:
                continue  # somebody else was faster, or a process that was killed at this is undone
            except (OSError, RuntimeError):  # or no thread can be started to renew it
                GIVEN_BACK.add(holder.token)
                raise
        return None

    @classmethod
    def wait_for(cls, folder: Location, name: str, *, worker_id: str, timeout_s: float) -> Lease:
        """Take the lease as soon as it is free or stale, however long that takes."""
        wait = Wait(folder, name, timeout_s=timeout_s)
        while True:
            lease = cls.acquire(folder, name, worker_id=worker_id, timeout_s=timeout_s)
            if lease is not None:
                return lease
            wait.tell()
            time.sleep(POLL_S)

    @spent_on("leases")
    def verify(self) -> None:
        """Renew the lease, which shows that it is still held.

        Raises:
            LeaseLostError: when it was taken over, or its file is gone.
        """
        self._renew()
        if self._stop.is_set() or self._is_lost:
            found = files.read(self.path)
            to = f" to {holder_of(*found).worker_id}" if found is not None else ""
            raise LeaseLostError(f"lease {self.name} was lost{to}: {self.path}")

    @spent_on("leases")
    def release(self) -> None:
        """Give the lease back; does nothing when it is no longer held.

        Where the file cannot be removed it stands until this process takes the name again, or ends.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        self._heart.join()
        GIVEN_BACK.add(self.holder.token)
        with self._writing, suppress(OSError):
            while not self._is_lost:
                try:
                    files.remove(self.path, self._version, durable=False)
                    GIVEN_BACK.discard(self.holder.token)
                    return
                except ChangedError:
                    self._look()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self.holder.timeout_s / BEATS_PER_TIMEOUT):
            # An error is let pass: the next beat may come through, and verify() is what decides.
            with suppress(OSError), spent_on("leases"):
                self._renew()
            if self._is_lost:
                return

    def _renew(self) -> None:
        with self._writing:
            if self._stop.is_set() or self._is_lost:
                return
            self.holder = msgspec.structs.replace(self.holder, beat=self.holder.beat + 1)
            try:
                self._version = write(self.path, self.holder, self._version)
            except ChangedError:
                self._look()

    def _look(self) -> None:
        """See whether the lease is ours after all: a write that failed half way may be through."""
        found = files.read(self.path)
        if found is not None and holder_of(*found).token == self.holder.token:
            self._version = found[1].version
        else:
            self._is_lost = True


class Wait:
    """Somebody's wait for a lease. `tell` says for whom, when it is long, and again when another
    holds it, or the holder has fallen silent."""

    def __init__(self, folder: Location, name: str, *, timeout_s: float) -> None:
        self.folder = folder
        self.name = name
        self.timeout_s = timeout_s
        self.next_look = time.monotonic() + TELL_AFTER_S
        self.told: set[tuple[str, bool]] = set()

    def tell(self) -> None:
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + TELL_AFTER_S
        found = files.read(self.folder / f"{self.name}{SUFFIX}")
        if found is None:
            return
        lease = lease_info(found[1], holder_of(*found), files.now(self.folder), is_read=True)
        lease = msgspec.structs.replace(lease, silent_s=max(lease.silent_s, self.timeout_s))
        if (kind := (lease.worker_id, lease.is_silent)) not in self.told:
            self.told.add(kind)
            logger.info("waiting for %s", lease)


def write(path: Location, holder: Holder, version: Version | None) -> Version:
    """Put a lease's content over that version. A power cut may take it: its process is gone too."""
    return files.replace(path, msgspec.json.encode(holder), version, durable=False)


def list_leases(
    folder: Location,
    *,
    now: float | None = None,
    known: dict[str, tuple[Version, Holder]] | None = None,
    entries: Iterable[Entry] | None = None,
) -> list[LeaseInfo]:
    """All leases in a folder, sorted by name.

    Args:
        now: the store's time, where the caller knows it.
        entries: the files of the folder to look at; all of them where none are given.
        known: what was read before, by file name; kept up to date. With it a lease is read once a
            beat at most; and of more than MANY_LEASES those that beat within BEATING_S are not
            read at all, since their holders live: who they are may be `unknown` then.
    """
    entries = files.list_files(folder) if entries is None else entries
    found = [entry for entry in entries if entry.name.endswith(SUFFIX)]
    if not found:
        return []
    now = files.now(folder) if now is None else now
    holders = {} if known is None else known
    for name in holders.keys() - {one.name for one in found}:
        del holders[name]
    infos = []
    for entry in found:
        version, holder = holders.get(entry.name, ("", UNKNOWN))
        is_beating = known is not None and age_of(entry, now) < BEATING_S
        if version != entry.version and not (is_beating and len(found) > MANY_LEASES):
            current = files.read(entry.path)
            if current is None:
                continue
            entry, holder = current[1], holder_of(*current)
            version = entry.version
            holders[entry.name] = version, holder
        infos.append(lease_info(entry, holder, now, is_read=version == entry.version))
    return infos


def lease_info(entry: Entry, holder: Holder, now: float, *, is_read: bool) -> LeaseInfo:
    """A lease as its file tells it; not `is_read`: as it was before its last beat."""
    return LeaseInfo(
        name=entry.path.stem,
        worker_id=holder.worker_id,
        host=holder.host,
        pid=holder.pid,
        held_s=max(0.0, now - holder.started),
        age_s=age_of(entry, now),
        is_alive=is_alive(holder) if is_read else None,
        is_stale=is_read and is_stale(holder, entry, now),
        silent_s=holder.timeout_s,
        version=entry.version,
    )


def end_leases_of(folder: Location, worker_id: str) -> None:
    """Remove whatever leases a worker holds."""
    for lease in list_leases(folder):
        if lease.worker_id == worker_id:
            with suppress(ChangedError):
                files.remove(folder / f"{lease.name}{SUFFIX}", lease.version, durable=False)


def is_stale(holder: Holder, entry: Entry, now: float, timeout_s: float = 0.0) -> bool:
    """Whether a lease may be taken over.

    The longer of both timeouts counts: the holder's says how often it promised to beat.
    """
    age_s = age_of(entry, now)
    return is_alive(holder) is False or age_s > max(timeout_s, holder.timeout_s)


def age_of(entry: Entry, now: float) -> float:
    """Seconds since a lease's last beat; of one from ahead, since this process first saw it."""
    if entry.modified - now <= AHEAD_S:
        return max(0.0, now - entry.modified)
    seen_at = time.monotonic()
    version, since = FIRST_SEEN.get(str(entry.path), ("", seen_at))
    if version != entry.version:
        since = seen_at
        FIRST_SEEN[str(entry.path)] = entry.version, since
    return seen_at - since


def is_alive(holder: Holder) -> bool | None:
    """Whether the holder's process runs; None when it cannot be seen from this system."""
    if not holder.system or holder.system != system_identity():
        return None
    start = process_start(holder.pid)
    if start is not None:
        return start == holder.process_start
    try:
        os.kill(holder.pid, 0)  # sends nothing: /proc may hide other users' processes
    except (ProcessLookupError, OverflowError):  # no process has so large a number
        return False
    except PermissionError:
        pass
    return None


def this_process(worker_id: str, timeout_s: float, *, number: int, now: float) -> Holder:
    """A new holder: this process, with a fresh token."""
    return Holder(
        token=uuid.uuid4().hex,
        number=number,
        worker_id=worker_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        system=system_identity(),
        process_start=process_start(os.getpid()) or "",
        started=now,
        timeout_s=timeout_s,
    )


def holder_of(content: bytes, entry: Entry) -> Holder:
    """Who holds a lease, by its file.

    Only a crash of the whole system leaves a file that tells nobody; it goes stale like any other.
    """
    try:
        return msgspec.json.decode(content, type=Holder)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        token = f"damaged-{entry.version}"
        return msgspec.structs.replace(UNKNOWN, token=token, started=entry.modified)
