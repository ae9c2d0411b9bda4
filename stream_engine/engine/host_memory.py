"""What memory this host has left for a process: the kernel's word, and control groups' limits."""

from __future__ import annotations

import os
from pathlib import Path


def host_available(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), *, share: int = 1
) -> int:
    """Bytes that this process may still take of the host's memory: one `share`-th of what is left.

    The kernel's MemAvailable, or less where a control group's limit is nearer. File pages count as
    free: they are given up when memory is asked for.
    """
    left = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) << 10)
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "")
            root = cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            root = cgroups / "memory"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            room = _group_room(root / group, *names)
            if room is not None:
                left.append(room)
    return max(0, min(left)) // max(1, share)


def _group_room(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes below a control group's limit; None without one."""
    stated, used = _lines(folder / limit), _lines(folder / usage)
    if not stated or not used or not stated[0].isdigit():
        return None
    reclaimable = {f"{prefix}inactive_file", f"{prefix}active_file"}
    pages = [line.split() for line in _lines(folder / "memory.stat")]
    cached = sum(int(value) for name, value in pages if name in reclaimable)
    return int(stated[0]) - int(used[0]) + cached


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
