"""What a person sees while a run goes on: log files, a live view, or one line every few seconds.

Knows no files and no shards: it is handed numbers.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

import msgspec

from stream_engine.store.base import Location, ObjectPath
from stream_engine.text import describe, duration, printable
from stream_engine.work.stored_log import StoredLog

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

LOGGER_NAME = "stream_engine"
LINE_INTERVAL_S = 5.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker does now. Rates are None where they are not known."""

    name: str
    doing: str
    since_s: float
    questions_per_s: float | None = None
    tokens_per_s: float | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run stands. Counts are of the whole run, rates of this launch."""

    doing: str
    samples_done: int = 0
    samples_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    shards_failed: int = 0
    quarantined: int = 0
    questions_per_s: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    workers: tuple[WorkerRow, ...] = ()


class ScreenHandler(logging.Handler):
    """Prints to whatever sys.stderr is now, which a live view replaces while it stands."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), sys.stderr)


def say(text: str, stream: TextIO) -> None:
    """Print a line; one that a full disk behind the stream does not take is lost.

    Raises:
        BrokenPipeError: when nobody reads any more.
    """
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


class LogFile(logging.FileHandler):
    """A log on a disk; what the disk does not take is lost, and no more is said of it."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class LineFormatter(logging.Formatter):
    """One line a message, whatever foreign text it quotes; tracebacks follow as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def set_up_logging(log_file: Location, *, worker: str, echo: bool) -> logging.Logger:
    """Log everything of this package to `log_file`, and to stderr when `echo` (else warnings)."""
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    to_file = file_handler(log_file)
    to_file.setFormatter(LineFormatter(f"%(asctime)s %(levelname)s {worker} %(message)s"))
    to_screen = ScreenHandler()
    to_screen.setFormatter(LineFormatter("%(message)s"))
    to_screen.setLevel(logging.INFO if echo else logging.ERROR)
    logger.addHandler(to_file)
    logger.addHandler(to_screen)
    return logger


def file_handler(log_file: Location) -> logging.Handler:
    """What adds lines to a log file."""
    if isinstance(log_file, ObjectPath):
        return StoredLog(log_file)
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        return LogFile(log_file, encoding="utf-8")
    except OSError as error:  # it may be of another user, who began the run
        say(f"no log is written: {printable(describe(error))}", sys.stderr)
        return logging.NullHandler()


def line(progress: Progress) -> str:
    """Progress in one line."""
    parts = [progress.doing]
    if progress.samples_total:
        share = progress.samples_done / progress.samples_total
        parts.append(f"{progress.samples_done}/{progress.samples_total} questions ({share:.0%})")
    parts.append(f"shards {progress.shards_done}/{progress.shards_total}")
    if progress.questions_per_s is not None:
        parts.append(f"{progress.questions_per_s:.2f} questions/s")
    if progress.tokens_per_s is not None:
        parts.append(f"{progress.tokens_per_s:.0f} tokens/s")
    if progress.eta_s is not None:
        parts.append(f"ETA {duration(progress.eta_s)}")
    if progress.workers:
        parts.append(f"{len(progress.workers)} at work")
    if progress.quarantined:
        parts.append(f"{progress.quarantined} quarantined")
    if progress.shards_failed:
        parts.append(f"{progress.shards_failed} shards failed")
    return ", ".join(parts)


class ProgressView:
    """Shows Progress: a live table on a terminal, a line every few seconds elsewhere.

    `silent` shows nothing (ranks other than the first). A context manager; `update` is cheap and
    may be called often.
    """

    def __init__(
        self,
        *,
        silent: bool = False,
        stream: TextIO | None = None,
        listener: Callable[[Progress], None] | None = None,
    ) -> None:
        """`listener` is handed whatever is shown, also of a silent view."""
        self.listener = listener
        self.stream = stream or sys.stderr
        self.silent = silent
        self.live: Live | None = None
        self._last_line = 0.0
        self._last_text = ""
        if not silent and self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(
                console=Console(file=self.stream), refresh_per_second=4, transient=True
            )

    def __enter__(self) -> ProgressView:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def is_due(self, *, at_once: bool = False) -> bool:
        """Whether an update would show, so that numbers are gathered only when needed.

        `at_once` counts for a live view alone: lines are not to follow each other faster.
        """
        if self.live and at_once:
            return True
        interval = 0.25 if self.live else LINE_INTERVAL_S
        return (
            not self.silent or self.listener is not None
        ) and time.monotonic() - self._last_line >= interval

    def update(self, progress: Progress, *, at_once: bool = False) -> None:
        """Show `progress` if it is time to."""
        if not self.is_due(at_once=at_once):
            return
        self._last_line = time.monotonic()
        if self.listener is not None:
            self.listener(progress)
        if self.silent:
            return
        if self.live:
            self.live.update(table(progress))
        elif (text := line(progress)) != self._last_text:
            self._last_text = text
            say(f"[{time.strftime('%H:%M:%S')}] {text}", self.stream)


def table(progress: Progress) -> Group:
    """Progress as a rich renderable: the totals, a bar, and a row a worker."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("worker", "doing", "for", "questions/s", "tokens/s"):
        rows.add_column(title, justify="left" if title in ("worker", "doing") else "right")
    for worker in progress.workers:
        rows.add_row(
            worker.name,
            worker.doing,
            duration(worker.since_s),
            "" if worker.questions_per_s is None else f"{worker.questions_per_s:.2f}",
            "" if worker.tokens_per_s is None else f"{worker.tokens_per_s:.0f}",
        )
    bar = Table.grid()  # in a grid, since a bar alone does not end its line
    bar.add_row(
        ProgressBar(total=max(1, progress.samples_total), completed=progress.samples_done, width=60)
    )
    return Group(Text(line(progress)), bar, rows)
