"""A worker's log in an object store: there is no appending, so its end is written now and then."""

from __future__ import annotations

import contextlib
import logging
import time

from stream_engine.errors import ChangedError
from stream_engine.store import files
from stream_engine.store.base import ObjectPath

WRITE_S = 30.0
KEPT_BYTES = 1 << 20


class StoredLog(logging.Handler):
    """Adds to the log of that name, and keeps its last mebibyte. A store that fails costs lines."""

    def __init__(self, path: ObjectPath) -> None:
        super().__init__()
        self.path = path
        self.content = files.read_bytes(path) or b""
        self.written = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.content = (self.content + self.format(record).encode() + b"\n")[-KEPT_BYTES:]
        if time.monotonic() - self.written > WRITE_S:
            self.write()

    def write(self) -> None:
        """Put the log in place as it is now."""
        self.written = time.monotonic()
        with contextlib.suppress(OSError, ChangedError):
            files.replace(self.path, self.content, files.version_of(self.path))

    def close(self) -> None:
        if self.content:
            self.write()
        super().close()
