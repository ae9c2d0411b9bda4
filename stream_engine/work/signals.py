"""SIGTERM, as schedulers send it before they take a machine away: leases are given back at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stream_engine.run_dir.paths import RunDir
from stream_engine.store.leases import end_leases_of


@contextmanager
def exit_on_sigterm(run_dir: RunDir, worker_id: str) -> Iterator[None]:
    """Let SIGTERM end the process at once, with status 143 and no lease left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as error:
        if not received and not isinstance(error, SystemExit):
            raise
        # The signal may have come while a lease was being taken, before anybody owned it.
        end_leases_of(run_dir.leases_dir, worker_id)
        if isinstance(error, SystemExit):
            raise
        # It broke into something (a lock being taken) that made an error of its own of it.
        raise SystemExit(128 + received[0]) from error
    finally:
        signal.signal(signal.SIGTERM, before)
