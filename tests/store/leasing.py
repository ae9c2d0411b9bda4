"""Leases for tests: taken here, left by another host, and a store that fails once."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import msgspec
import pytest

from stream_engine.run_dir.paths import RunDir
from stream_engine.store.leases import Lease, this_process


def acquire(run_dir: RunDir, worker_id: str = "me", timeout_s: float = 60.0) -> Lease | None:
    return Lease.acquire(
        run_dir.leases_dir, "shard-000000", worker_id=worker_id, timeout_s=timeout_s
    )


def fail_once_after(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a call of `os` do its work, and say once that it failed."""
    call, failures = getattr(os, name), [OSError(errno.EIO, "Input/output error")]

    def failing(source: str, target: str) -> None:
        call(source, target)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, name, failing)


def foreign_lease(run_dir: RunDir, *, age_s: float, timeout_s: float = 60.0, **changes) -> Path:
    """The lease of a worker on another machine, last touched so long ago."""
    path = run_dir.lease("shard-000000")
    path.parent.mkdir(parents=True, exist_ok=True)
    foreign = {"worker_id": "far", "host": "elsewhere", "system": "other-boot/pid:[1]", **changes}
    mine = this_process("far", timeout_s, number=1, now=time.time() - age_s)
    holder = msgspec.structs.replace(mine, **foreign)
    path.write_bytes(msgspec.json.encode(holder))
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path
