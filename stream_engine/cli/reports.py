"""The commands that show a run's pairs to people: `report` and `show`.

What they need is imported when they run: templates and terminal drawing are no part of `--help`.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from stream_engine.cli import notes
from stream_engine.cli.command import WORK_DIR, Command, work_dir_given
from stream_engine.cli.flags import convert_flag
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, StreamEngineError
from stream_engine.report import DEFAULT_ROWS
from stream_engine.run_dir.paths import RunDir
from stream_engine.store.base import ObjectPath
from stream_engine.store.files import location
from stream_engine.text import DENIED, describe, duration, printable
from stream_engine.work.runner import RunReport

if TYPE_CHECKING:
    from stream_engine.report.site import Report

logger = logging.getLogger(__name__)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    parser.add_argument("--work_dir", "--output_dir", metavar="TEXT", help=WORK_DIR)
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to, on a disk; default: report/ in the work_dir"
    )
    parser.add_argument(
        "--rows",
        default=str(DEFAULT_ROWS),
        metavar="N",
        help="pairs drawn to be looked at one by one, by the run's seed; the extremes and some of "
        f"what was dropped come on top (default {DEFAULT_ROWS})",
    )


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", help=WORK_DIR)
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="a pair as the report names it, a sample's key, your id"
    )
    parser.add_argument(
        "--limit", default="5", metavar="N", help="pairs to print without ID (default 5)"
    )
    parser.set_defaults(work_dir=None)


def report(args: argparse.Namespace) -> int:
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.site import write_report

    num_rows = convert_flag("rows", args.rows, int)
    run = ReportedRun.open(work_dir_given(args))
    folder = location(args.out, setting="out") if args.out else None
    try:
        made = write_report(run, folder, num_rows=num_rows, seed=run.config.seed)
    except OSError as error:
        if folder is not None or error.errno not in DENIED:
            raise
        raise ConfigError(f"{describe(error)}; name another folder by --out") from error
    print(printable(line_of(made)))
    return 0


def show(args: argparse.Namespace) -> int:
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.terminal import show_pairs

    limit = convert_flag("limit", args.limit, int)
    run = ReportedRun.open(work_dir_given(args))
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


COMMANDS = {
    "report": Command(report, _report_arguments, notes=notes.SHOWN),
    "show": Command(show, _show_arguments),
}
