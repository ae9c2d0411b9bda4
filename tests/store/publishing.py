"""What tests of files on a disk and in an object store have in common."""

from __future__ import annotations

import threading

from stream_engine.errors import ChangedError
from stream_engine.store import files
from stream_engine.store.base import Location


def publish_in_spite(path: Location, content: bytes) -> None:
    """Write a file, and again when that finished what another process had begun."""
    while True:
        try:
            files.replace(path, content, files.version_of(path))
            return
        except ChangedError:
            continue


def count_in_threads(path: Location, *, num_threads: int, times: int) -> None:
    """Let each of the threads add 1 to the number in a file so often."""

    def add() -> None:
        for _ in range(times):
            while True:
                found = files.read(path)
                assert found is not None
                try:
                    number = b"%d" % (int(found[0]) + 1)
                    files.replace(path, number, found[1].version, durable=False)
                    break
                except ChangedError:
                    continue

    files.create(path, b"0")
    threads = [threading.Thread(target=add) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
