"""What each command does: settings in, the right function called, a few lines out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from stream_engine import api
from stream_engine.cli.flags import convert_flag, read_settings
from stream_engine.cli.reports import report_after, work_dir_of
from stream_engine.config import InputConfig, ModelConfig, RunConfig
from stream_engine.demo import DEMO_COUNT, DEMO_SEED, demo_models
from stream_engine.errors import ChangedError, ConfigError
from stream_engine.models.hub import with_checkpoints, with_folders
from stream_engine.outputs.formats import EXPORTS
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.inspect import inspect as inspect_lines
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.refusals import DEMO_DATASET
from stream_engine.run_dir.remedies import remedy_lines
from stream_engine.run_dir.requeue import requeue
from stream_engine.run_dir.run_json import merged_sources, read_run_file
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import Status, collect, no_pairs, problems
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.store.files import location
from stream_engine.store.locations import canonical_source
from stream_engine.text import printable
from stream_engine.work.plan import plan_lines
from stream_engine.work.runner import ALL_STEPS, RunReport, Step, begin, retry_shard, run

DEMO_SHARD = 32  # small shards, so that two workers share the few questions evenly


# -- commands that work ---------------------------------------------------------------------------


def run_command(args: argparse.Namespace) -> int:
    return finish(args, config_from(args))


def append(args: argparse.Namespace) -> int:
    config, given = config_of_run(args), read_settings(args)
    if not args.dataset_path:
        raise ConfigError("append needs --dataset_path, the dataset to add")
    new = dataclasses.replace(
        config,
        dataset_path=tuple(given["dataset_path"]),
        max_samples=given.get("max_samples"),  # the run's own is of what it was given with
    )
    return finish(args, new)


def shard(args: argparse.Namespace) -> int:
    return finish(args, config_of_run(args, may_be_new=True), steps=("shard",))


def work(args: argparse.Namespace) -> int:
    config = config_of_run(args)
    if args.shard is None:
        return finish(args, config, steps=("work",))
    retry_shard(config, args.shard)
    print(f"shard {args.shard} is done; `stream-engine merge {config.work_dir}` takes it up")
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
    pipeline = pipeline_class(config.pipeline_name)(with_checkpoints(config))
    run_file = begin(run_dir, config, pipeline, rank)
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
    args: argparse.Namespace, config: RunConfig, *, steps: Sequence[Step] = ALL_STEPS
) -> int:
    """Run these steps and print how it ended, from the first worker only; returns the status."""
    report = run(config, steps=steps)
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
    lines.append(f"to try these again: stream-engine retry-failed {report.work_dir}")
    return lines


# -- commands that look ---------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> int:
    for line in plan_lines(config_from(args, make_demo_data=False)):
        print(line)
    return 0


def status(args: argparse.Namespace) -> int:
    state = open_state(args)
    found = collect(state)
    if args.json:
        print(msgspec.json.encode(found).decode())
    else:
        print("\n".join(status_lines(found)))
        for problem in problems(state):
            print(f"  {printable(problem)}")
    if not args.check:
        return 0
    if not found.is_finished:
        return 1
    return 2 if found.has_problems or no_pairs(state.run_dir) else 0


def status_lines(status: Status) -> list[str]:
    """A status for people."""
    samples, shards, pairs = status.samples, status.shards, status.pairs
    lines = [
        f"samples: {samples.total} = {samples.done} done + {samples.quarantined} quarantined "
        f"+ {samples.pending} pending",
        f"shards:  {shards.total} = {shards.done} done + {shards.failed} failed "
        f"+ {shards.running} running + {shards.pending} pending",
    ]
    if status.pictures:
        by_number = ", ".join(f"{count} with {k}" for k, count in status.pictures.items())
        lines.append(f"pictures: {by_number}")
    most_first = sorted(pairs.dropped.items(), key=lambda item: (-item[1], item[0]))
    dropped = ", ".join(f"{count} {why}" for why, count in most_first)
    total = sum(pairs.dropped.values())
    lines.append(
        f"pairs:   {pairs.candidates} candidates = {pairs.written} written + {total} dropped"
        + (f" ({dropped})" if dropped else "")
    )
    for one in status.waiting:
        lines.append(f"waiting: shard {one.shard} for {one.retry_in_s:.0f} s more: {one.error}")
    for worker in status.workers:
        lines.append(f"worker:  {worker.worker} holds {worker.holds} for {worker.since_s:.0f} s")
    return lines


def validate(args: argparse.Namespace) -> int:
    from stream_engine.inputs.validate import InputCheck
    from stream_engine.outputs.validate import MAX_PROBLEMS, is_dataset, is_run
    from stream_engine.outputs.validate import validate as find_problems
    from stream_engine.run_dir.verify import damaged_parts

    config = RunConfig.create(read_settings(args)).part(InputConfig)
    path = args.path
    if not is_dataset(path):
        check = InputCheck(path, config)
        num_found = 0
        for problem in check.problems():
            num_found += 1
            if num_found <= MAX_PROBLEMS:
                print(problem)
        if num_found > MAX_PROBLEMS:
            print(f"and {num_found - MAX_PROBLEMS} more")
        for line in check.lines():
            print(f"{printable(path)}: {line}")
    else:
        found = find_problems(path)
        if is_run(location(path)):
            args.positional_work_dir = path
            found = [*damaged_parts(open_state(args)), *found]
        for problem in found:
            print(printable(problem))
        num_found = len(found)
    print(f"{printable(path)}: {num_found} problems" if num_found else f"{printable(path)}: ok")
    return 2 if num_found else 0


def export(args: argparse.Namespace) -> int:
    formats = convert_flag("format", args.format or [], tuple[str, ...])
    if not formats:
        raise ConfigError(f"export needs --format; choose from {', '.join(EXPORTS)}")
    if args.out and len(formats) > 1:
        raise ConfigError(f"--out takes one format, not {','.join(formats)}")
    folder = location(args.out, setting="--out") if args.out else None
    output: dict[str, Any] = {}
    if args.max_part_bytes is not None:
        output["max_part_bytes"] = convert_flag("max_part_bytes", args.max_part_bytes, int)
    if args.test_fraction is not None:
        output["test_fraction"] = convert_flag("test_fraction", args.test_fraction, float)
    work_dir = work_dir_of(args) or RunConfig().work_dir
    for name in formats:
        written = api.export(work_dir, name, folder=folder, **output)
        print(f"{name}: {written.written} pairs in {written.folder}")
    return 0


def push(args: argparse.Namespace) -> int:
    work_dir = work_dir_of(args) or RunConfig().work_dir
    print(api.push(work_dir, args.repository, format=args.format, private=args.private))
    return 0


def inspect(args: argparse.Namespace) -> int:
    for text in inspect_lines(open_state(args), args.target):
        for line in text.split("\n"):
            print(printable(line))
    return 0


def verify(args: argparse.Namespace) -> int:
    from stream_engine.engine.verify_checkpoint import verify_checkpoint

    models = ModelConfig(
        device=args.device, dtype=args.dtype, vision_tower_path=args.vision_tower_path
    )
    marks = {True: "ok", False: "FAILED", None: "-"}
    num_failed = 0
    checkpoint = with_folders("checkpoint", args.checkpoint)
    for check in verify_checkpoint(checkpoint, models, reference=args.reference):
        print(f"{marks[check.ok]:6}  {check.name}: {check.shown}", flush=True)
        num_failed += check.ok is False
    print(f"{num_failed} checks failed" if num_failed else "all checks passed")
    return 2 if num_failed else 0


# -- settings -------------------------------------------------------------------------------------


def config_from(args: argparse.Namespace, *, make_demo_data: bool = True) -> RunConfig:
    """The settings of a command line alone (`run`, `plan`)."""
    return RunConfig.create(with_demo(args, read_settings(args), make_demo_data=make_demo_data))


def config_of_run(args: argparse.Namespace, *, may_be_new: bool = False) -> RunConfig:
    """The settings kept in a run, with those of the command line over them."""
    args.work_dir = work_dir_of(args)
    given = read_settings(args)
    work_dir = given.get("work_dir", RunConfig().work_dir)
    run_dir = RunDir(work_dir)
    if may_be_new and not files.exists(run_dir.run_json):
        return RunConfig.create(with_demo(args, given, make_demo_data=True))
    base = read_run_file(run_dir).settings
    settings = read_settings(args, base | {"work_dir": work_dir})
    settings["dataset_path"] = merged_sources(base["dataset_path"], settings["dataset_path"])
    return RunConfig.create(settings)


def with_demo(
    args: argparse.Namespace, settings: dict[str, Any], *, make_demo_data: bool
) -> dict[str, Any]:
    """The settings with the embedded models and data in the places left empty, for --demo."""
    if not args.demo:
        return settings
    defaults = RunConfig()
    models = demo_models(settings.get("pipeline_name", defaults.pipeline_name))
    settings = models | {name: value for name, value in settings.items() if value is not None}
    if not settings.get("dataset_path"):
        path = RunDir(settings.get("work_dir", defaults.work_dir)).root / DEMO_DATASET
        if make_demo_data:
            write_demo_dataset(path)
        settings["dataset_path"] = (str(path),)
        settings.setdefault("samples_per_shard", DEMO_SHARD)
    return settings


def write_demo_dataset(path: Location) -> None:
    """Write the embedded dataset, unless it is there; workers that start together write it once."""
    from stream_engine.demo.data import dataset_bytes

    if not files.exists(path):
        with suppress(ChangedError):
            files.create(path, dataset_bytes(DEMO_COUNT, DEMO_SEED))


def open_state(args: argparse.Namespace) -> RunState:
    """The state of the run that a command line names."""
    return api.open_state(work_dir_of(args) or RunConfig().work_dir)
