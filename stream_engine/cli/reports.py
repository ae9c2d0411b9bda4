"""The commands that show a run's pairs to people: `report` and `show`.

What they need is imported when they run: templates and terminal drawing are no part of `--help`.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from stream_engine.cli.flags import convert_flag
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, StreamEngineError
from stream_engine.report import DEFAULT_ROWS
from stream_engine.run_dir.paths import RunDir
from stream_engine.store.base import ObjectPath
from stream_engine.store.files import location
from stream_engine.text import describe, duration, printable
from stream_engine.work.runner import RunReport

if TYPE_CHECKING:
    from stream_engine.report.site import Report

logger = logging.getLogger(__name__)


def report(args: argparse.Namespace) -> int:
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.site import write_report

    num_rows = convert_flag("rows", args.rows, int)
    run = ReportedRun.open(work_dir_of(args) or RunConfig().work_dir)
    folder = location(args.out, setting="out") if args.out else None
    print(printable(line_of(write_report(run, folder, num_rows=num_rows, seed=run.config.seed))))
    return 0


def show(args: argparse.Namespace) -> int:
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.terminal import show_pairs

    limit = convert_flag("limit", args.limit, int)
    run = ReportedRun.open(work_dir_of(args) or RunConfig().work_dir)
    show_pairs(run, args.id, limit=limit)
    return 0


def report_after(config: RunConfig, ended: RunReport, *, is_alone: bool) -> str | None:
    """The report's page after a run, made when it is due; None where there is none.

    It is made by the worker that merged, or by a lone one when an earlier process was ended before
    it came to it. A report that cannot be made is no failure of the run.
    """
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.site import is_current, write_report

    run_dir = RunDir(config.work_dir)
    if config.report == "never" or ended.dataset is None or isinstance(run_dir.root, ObjectPath):
        return None
    is_due = not is_current(run_dir)
    if is_due and (ended.merged_here or is_alone):
        try:
            run = ReportedRun.open(run_dir.root)
            made = write_report(run, num_rows=DEFAULT_ROWS, seed=config.seed)
            logger.info("%s", line_of(made))
        except (StreamEngineError, OSError) as error:
            logger.warning("no report: %s", describe(error))
            return None
        return made.page
    return None if is_due else str(run_dir.report_html)


def line_of(made: Report) -> str:
    """A report that was made, in one line."""
    return (
        f"report: {made.page} ({made.num_shown:,} of {made.num_pairs:,} pairs, "
        f"{made.num_bytes / 1e6:.1f} MB, {duration(made.seconds)})"
    )


def work_dir_of(args: argparse.Namespace) -> str | None:
    """The work directory that a command line names, by its place or by its flag."""
    positional, flag = args.positional_work_dir, args.work_dir
    if positional is not None and flag is not None and positional != flag:
        raise ConfigError(f"two work directories: {positional} and {flag}")
    return positional or flag
