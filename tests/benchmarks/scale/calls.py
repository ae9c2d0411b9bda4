"""What is asked of the disk, counted at the functions that all of the program calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from stream_engine.store.local import LocalSpool, LocalStore

CALLS = ("list", "listed files", "stat", "read", "read ends", "open", "publish")
"""Of a listing each file counts too, whose attributes are read."""
METHODS = {
    "list_files": "list",
    "stat": "stat",
    "read": "read",
    "read_ends": "read ends",
    "open": "open",
}


def count_calls(add: Callable[[str, int], None]) -> None:
    """From now on `add` is told of each call and how often it counts, by the thread that makes it.

    A lock here would have all threads wait for each other at every call.
    """

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            add(name, 1)
            if name == "list":
                add("listed files", len(found))
            return found

        return call

    for method, name in METHODS.items():
        setattr(LocalStore, method, counted(getattr(LocalStore, method), name))
    LocalSpool.publish = counted(LocalSpool.publish, "publish")
