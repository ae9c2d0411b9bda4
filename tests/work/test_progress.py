"""What a person sees: one line, or a live table on a terminal."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from stream_engine.work import progress as console
from stream_engine.work.progress import (
    Progress,
    ProgressView,
    ScreenHandler,
    WorkerRow,
    duration,
    line,
    table,
)

PROGRESS = Progress(
    doing="working",
    samples_done=312,
    samples_total=1000,
    shards_done=3,
    shards_total=8,
    shards_failed=1,
    quarantined=2,
    questions_per_s=5.25,
    tokens_per_s=410.0,
    eta_s=131.0,
    workers=(
        WorkerRow(name="rank0@a:1", doing="shard 4", since_s=12.0, questions_per_s=2.5),
        WorkerRow(name="rank1@b:2", doing="shard 5", since_s=3.0, tokens_per_s=200.0),
    ),
)


class Full(io.StringIO):
    num_refused = 0

    def write(self, text: str) -> int:
        self.num_refused += 1
        raise OSError(errno.ENOSPC, "No space left on device")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_all_that_matters() -> None:
    assert line(PROGRESS) == (
        "working, 312/1000 questions (31%), shards 3/8, 5.25 questions/s, 410 tokens/s, "
        "ETA 2m 11s, 2 at work, 2 quarantined, 1 shards failed"
    )


def test_the_live_view_has_a_row_for_each_worker() -> None:
    screen = Console(file=io.StringIO(), width=160)
    screen.print(table(PROGRESS))
    rows = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("rank0@a:1" in row and "shard 4" in row and "2.50" in row for row in rows)
    assert any("rank1@b:2" in row and "shard 5" in row and "200" in row for row in rows)
    assert rows[0].startswith("working") and rows[2].startswith("worker")


def test_lines_come_only_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with ProgressView(stream=stream) as view:
        for now in (100.0, 101.0, 104.9, 105.1, 106.0):
            view.update(Progress(doing=f"step {now}"))
    assert [text.split("] ")[1].split(",")[0] for text in stream.getvalue().splitlines()] == [
        "step 100.0",
        "step 105.1",
    ]


def test_a_terminal_gets_the_live_view_and_a_file_does_not() -> None:
    with ProgressView(stream=Terminal()) as view:
        assert view.live is not None
    with ProgressView(stream=io.StringIO()) as view:
        assert view.live is None


def test_ranks_but_the_first_are_silent() -> None:
    stream = Terminal()
    with ProgressView(silent=True, stream=stream) as view:
        assert not view.is_due()
        view.update(PROGRESS)
    assert stream.getvalue() == ""


def test_each_rank_has_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_logging(tmp_path / "logs/rank-3.log", worker="rank3@a:1", echo=False)
    logging.getLogger("stream_engine.work.worker").info("shard 7 done")
    assert "rank3@a:1 shard 7 done" in (tmp_path / "logs/rank-3.log").read_text()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (75, "1m 15s"), (3600, "1h 00m"), (200_000, "2d 07h"), (-3, "0s")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_live_view_shows_at_once_what_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "working" stood there while models were loaded."""
    stream = Terminal()
    with ProgressView(stream=stream) as view:
        view.update(Progress(doing="sampling answers"))
        view.update(Progress(doing="loading models"))
        assert not view.is_due()
        view.update(Progress(doing="loading models"), at_once=True)
    assert "loading models" in stream.getvalue()


def test_lines_do_not_follow_each_other_faster_for_it() -> None:
    stream = io.StringIO()
    with ProgressView(stream=stream) as view:
        view.update(Progress(doing="sampling answers"))
        view.update(Progress(doing="loading models"), at_once=True)
    assert "loading models" not in stream.getvalue()


def test_a_disk_that_fails_costs_lines_of_the_log_and_nothing_else(tmp_path: Path, capsys) -> None:
    """logging printed a traceback for each line that could not be written."""
    logger = console.set_up_logging(tmp_path / "log", worker="w", echo=True)
    (handler,) = (one for one in logger.handlers if isinstance(one, logging.FileHandler))
    descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, handler.stream.fileno())
    os.close(descriptor)
    logger.info("all is well")
    assert capsys.readouterr().err == "all is well\n"
    console.set_up_logging(tmp_path / "log", worker="w", echo=True)


def test_a_full_disk_behind_the_screen_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose stderr went to a full disk waited for minutes, and ended."""
    full = Full()
    monkeypatch.setattr(sys, "stderr", full)
    ScreenHandler().emit(logging.makeLogRecord({"msg": "told"}))
    ProgressView(stream=full).update(Progress(doing="sampling"))
    assert full.num_refused == 2


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path, capsys) -> None:
    """In a folder that several users share the log of the first one stopped the second."""
    (tmp_path / "rank-0.log").mkdir()
    console.set_up_logging(tmp_path / "rank-0.log", worker="me", echo=True).info("at work")
    assert capsys.readouterr().err.splitlines()[1:] == ["at work"]
