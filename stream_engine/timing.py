"""CPU seconds of this process by what they went into beside the models.

Every thread counts for itself; what the models compute is not counted here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["looking", "leases", "reading", "pictures", "writing", "ranking"]
"""The run's state from its files; leases taken, renewed and given back; shards and results read;
pictures decoded; results written; candidate pairs made of them."""

_lock = threading.Lock()
_spent: dict[str, float] = {}


@contextmanager
def spent_on(part: Part) -> Iterator[None]:
    """Count the CPU seconds of this thread inside the block, or the function it decorates."""
    started = time.thread_time()
    try:
        yield
    finally:
        seconds = time.thread_time() - started
        with _lock:
            _spent[part] = _spent.get(part, 0.0) + seconds


def take() -> dict[str, float]:
    """Seconds by part since this was last called, by whichever thread; they are counted once."""
    with _lock:
        taken = dict(_spent)
        _spent.clear()
    return taken
