"""SIGTERM, as schedulers send it before they take a machine away, and SIGHUP, of a terminal that is
closed: leases are given back at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stream_engine.run_dir.paths import RunDir
from stream_engine.store.leases import end_leases_of

ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def exit_on_signals(run_dir: RunDir, worker_id: str) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process at once, with status 143 and 129 and no lease left
    behind. One that is ignored, as `nohup` has it, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        raise SystemExit(128 + signum)

    handlers = {number: signal.getsignal(number) for number in ENDINGS}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
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
        for number, handler in handlers.items():
            signal.signal(number, handler)
