"""What this process has had of servers since it last told: requests and tokens, by role.

Every answer counts that a server gave, whatever became of it.
"""

from __future__ import annotations

import threading

COUNTS = ("requests", "prompt_tokens", "completion_tokens")

_lock = threading.Lock()
_used: dict[str, dict[str, int]] = {}


def count(role: str, *, prompt_tokens: int, completion_tokens: int) -> None:
    """Count one answered request."""
    with _lock:
        used = _used.setdefault(role, dict.fromkeys(COUNTS, 0))
        for name, number in zip(COUNTS, (1, prompt_tokens, completion_tokens)):
            used[name] += number


def take() -> dict[str, dict[str, int]]:
    """The counts since this was last called; they are told once."""
    with _lock:
        taken = dict(_used)
        _used.clear()
    return taken


def added(
    before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Two counts as one."""
    return {
        role: {
            name: before.get(role, {}).get(name, 0) + now.get(role, {}).get(name, 0)
            for name in COUNTS
        }
        for role in sorted({*before, *now})
    }
