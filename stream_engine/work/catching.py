"""The one broad except of the package, and the errors that it must not hide.

Whatever a model's code raises, a bad record or a bad shard must not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stream_engine.errors import CheckpointError, ConfigError, ParallelError

T = TypeVar("T")

UNMENDABLE = (ConfigError, CheckpointError, ParallelError)
"""Errors of settings, models or lost ranks: they stop the run, since no retry can mend them."""


def caught(work: Callable[[], T]) -> T | Exception:
    """The result of `work`, or what it raised."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return error


def is_device_lost(error: Exception) -> bool:
    """Whether a model's code raised what says that this process can compute no more."""
    if not isinstance(error, RuntimeError):
        return False
    from stream_engine import device_errors  # imports torch

    return device_errors.is_device_lost(error)
