"""Which process wrote a file, and whether it lives: told across machines and containers."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

PROC = Path("/proc")


def this_system() -> str:
    """This system, in eight hex digits: pids can be compared only where it is equal."""
    identity = system_identity() or socket.gethostname()
    return hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()


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


def is_running(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
