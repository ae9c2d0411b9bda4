"""The commands that work on a run: all of it, its steps alone, once more, and what it would do."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
from collections.abc import Sequence

from stream_engine.cli import notes
from stream_engine.cli.command import WORK_DIR, Command, work_dir_of
from stream_engine.cli.flags import convert_flag, read_settings
from stream_engine.cli.launchers import add_launcher, launched_arguments, run_by_launcher
from stream_engine.cli.looking import status_lines
from stream_engine.cli.reports import report_after
from stream_engine.cli.run_file import settings_in_file
from stream_engine.cli.settings import (
    Planned,
    config_from,
    config_of_run,
    rounds_left,
    run_arguments,
)
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, RoundOverError
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.remedies import remedy_lines
from stream_engine.run_dir.requeue import requeue
from stream_engine.run_dir.rounds import answering_model
from stream_engine.run_dir.state import RunState
from stream_engine.store import files
from stream_engine.store.locations import canonical_source
from stream_engine.text import printable
from stream_engine.work.rounds import begin_round
from stream_engine.work.runner import (
    ALL_STEPS,
    RunReport,
    Step,
    begin,
    checked_pipeline,
    retry_shard,
)

logger = logging.getLogger(__name__)


def _work_dir_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_work_dir", metavar="WORK_DIR", nargs="?", help=WORK_DIR)
    run_arguments(parser)


def _append_arguments(parser: argparse.ArgumentParser) -> None:
    _work_dir_arguments(parser)
    add_launcher(parser)


def _round_arguments(parser: argparse.ArgumentParser) -> None:
    _append_arguments(parser)
    parser.add_argument(
        "--round",
        metavar="N",
        help="the round that is meant, so that the same line resumes it; by default the one at "
        "hand where that has these very models and settings, else the next",
    )


def _work_arguments(parser: argparse.ArgumentParser) -> None:
    _append_arguments(parser)
    parser.add_argument(
        "--shard", type=int, metavar="N", help="do this shard alone, in the foreground"
    )


def _retry_arguments(parser: argparse.ArgumentParser) -> None:
    _work_dir_arguments(parser)
    parser.add_argument(
        "--requeue_only",
        action="store_true",
        help="do not work: put failed shards and records back, for the workers of the next run",
    )


def run_command(args: argparse.Namespace) -> int:
    if rounds := rounds_left(args):
        return run_rounds(args, rounds)
    return finish(args, config_from(args))


def run_rounds(args: argparse.Namespace, rounds: Sequence[Planned]) -> int:
    """What is left of the rounds of a run file, as far as their models are there."""
    status = 0
    for one in rounds:
        run_dir = RunDir(one.config.work_dir)
        if one.number > 1 and (model := one.missing_model):
            before = run_dir.of_round(one.number - 1).dataset_dir
            tell(
                f"round {one.number} of {one.of} waits for its model: {model} is not there. Train "
                f"it on {before}, and give the same line again"
            )
            break
        tell(f"round {one.number} of {one.of}: {answering_model(one.config.to_dict())} answers")
        try:
            if one.number > 1:
                begin_round(one.config, one.number)
            status = max(status, finish(args, one.config, number=one.number))
        except RoundOverError as error:  # others of this run are through with it
            logger.info("%s", error)
        if one.config.run_stage is not None:
            break
    return status


def tell(line: str) -> None:
    """Print a line, from the first worker only."""
    if Rank.from_environment().rank == 0:
        print(printable(line), flush=True)


def append(args: argparse.Namespace) -> int:
    config, given = config_of_run(args), read_settings(args)
    if not args.dataset_path:
        raise ConfigError("append needs --dataset_path, the dataset to add")
    new = dataclasses.replace(
        config,
        dataset_path=tuple(given["dataset_path"]),
        max_samples=given.get("max_samples"),  # the run's own are of what it was given with
        questions=given.get("questions"),
    )
    return finish(args, new)


def next_round(args: argparse.Namespace) -> int:
    args.work_dir = work_dir_of(args)
    number = None if args.round is None else convert_flag("round", args.round, int)
    work_dir = args.work_dir or settings_in_file(args.config).get("work_dir")
    if not files.exists(RunDir(work_dir or RunConfig().work_dir).run_json):
        if number not in (None, 1):
            raise ConfigError(f"--round {number}: there is no run yet, so this is round 1")
        return finish(args, config_from(args))
    config, given = config_of_run(args), read_settings(args)
    config = dataclasses.replace(config, max_samples=given.get("max_samples"))
    begin_round(config, number)
    return finish(args, config)


def shard(args: argparse.Namespace) -> int:
    return finish(args, config_of_run(args, may_be_new=True), steps=("shard",))


def work(args: argparse.Namespace) -> int:
    config = config_of_run(args)
    if args.shard is None:
        return finish(args, config, steps=("work",))
    retry_shard(config, args.shard)
    print(
        f"shard {args.shard} is done; `stream-engine merge {shlex.quote(config.work_dir)}` "
        "takes it up"
    )
    return 0


def merge(args: argparse.Namespace) -> int:
    return finish(args, config_of_run(args), steps=("merge",))


def retry_failed(args: argparse.Namespace) -> int:
    config = config_of_run(args)
    rank = Rank.from_environment()
    if rank.world_size > 1:
        raise ConfigError(
            "retry-failed is one process: run `stream-engine retry-failed --requeue_only`, then "
            "the run itself with its launcher"
        )
    run_dir = RunDir(config.work_dir)
    needs_models = not args.requeue_only
    pipeline = checked_pipeline(config, needs_models=needs_models)
    run_file = begin(run_dir, config, pipeline, rank, needs_models=needs_models)
    state = RunState(run_dir, run_file.fingerprints, max_shard_retries=config.max_shard_retries)
    put_back = requeue(state, worker=rank.worker_id, timeout_s=config.lease_timeout_s)
    print(f"put back {put_back.shards} shards and {put_back.records} records")
    if put_back.rejected:
        when = "by the next run" if args.requeue_only else "now"
        print(
            f"{put_back.rejected} records were rejected when they were read: their inputs are read "
            f"again {when}, and what is there and correct by then is taken"
        )
    if args.requeue_only:
        return 0
    known = state.refresh().manifest.inputs  # those that are to be read again are so marked there
    unread = [path for path in config.dataset_path if canonical_source(path) not in known]
    return finish(args, dataclasses.replace(config, dataset_path=tuple(unread)))


def finish(
    args: argparse.Namespace,
    config: RunConfig,
    *,
    steps: Sequence[Step] = ALL_STEPS,
    number: int | None = None,
) -> int:
    """Run these steps and print how it ended, from the first worker only; returns the status.

    `number` is that of the round these settings are of, where a file has several.
    """
    report = run_by_launcher(args, config, steps, number)
    rank = Rank.from_environment()
    page = report_after(config, report, is_alone=rank.world_size == 1)
    if rank.rank == 0:
        for line in report_lines(report):
            print(printable(line))
        if page is not None:
            print(printable(f"report:  {page}"))
    return 0 if args.failures_ok else report.exit_status


def report_lines(report: RunReport) -> list[str]:
    """How a run ended: counts that add up, every problem, and the dataset's path last."""
    did_work = report.samples_added_here or report.shards_done_here or report.merged_here
    lines = []
    if report.status.samples.total and not report.status.shards.total:
        lines.append("no sample to work on: every record was rejected when it was read")
    elif report.status.is_finished and not did_work:
        lines.append("nothing to do" if report.problems else "nothing to do: all is up to date")
    lines += status_lines(report.status)
    lines += [f"note:    {note}" for note in report.notes]
    if report.problems:
        lines += ["failed:", *(f"  {problem}" for problem in report.problems)]
        lines += remedies(report)
    if report.no_pairs is not None:
        lines.append(f"NO PAIRS: {report.no_pairs}")
    if report.dataset is not None:
        lines.append(f"dataset: {report.dataset}")
    return lines


def remedies(report: RunReport) -> list[str]:
    """What helps against a report's problems: it depends on where a record was set aside.

    Rejected records of a corrected file are read again by any run; those whose picture has been
    supplied since, which no file of the input tells, by `retry-failed` alone.
    """
    status = report.status
    set_aside = sum(counts.quarantined for counts in status.stages.values())
    rejected = status.samples.quarantined - set_aside
    lines = []
    if rejected:
        where = ", ".join(report.rejects_files)
        lines.append(f"{rejected} rejected at reading: first correct the input (see {where})")
        lines += [f"  {line}" for line in remedy_lines(report.rejected)]
    lines.append(f"to try these again: stream-engine retry-failed {shlex.quote(report.work_dir)}")
    return lines


COMMANDS = {
    "run": Command(run_command, launched_arguments, takes_settings=True, notes=notes.RUN),
    "append": Command(append, _append_arguments, takes_settings=True, notes=notes.RUN),
    "round": Command(
        next_round, _round_arguments, takes_settings=True, notes=notes.ROUNDS + "\n" + notes.RUN
    ),
    "shard": Command(shard, _work_dir_arguments, takes_settings=True, notes=notes.INPUT),
    "work": Command(work, _work_arguments, takes_settings=True),
    "merge": Command(
        merge,
        _work_dir_arguments,
        takes_settings=True,
        notes=notes.PAIRS + "\n" + notes.PUBLISHED,
    ),
    "retry-failed": Command(retry_failed, _retry_arguments, takes_settings=True, notes=notes.RETRY),
}
