"""The settings of a command: from its line, a file, the run on hand, and the embedded default."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

from stream_engine.cli.command import work_dir_of
from stream_engine.cli.flags import read_settings
from stream_engine.config import RunConfig
from stream_engine.demo import DEMO_COUNT, DEMO_SEED, demo_models
from stream_engine.errors import ChangedError
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.refusals import DEMO_DATASET
from stream_engine.run_dir.run_json import merged_sources, read_run_file
from stream_engine.store import files
from stream_engine.store.base import Location

DEMO_SHARD = 32  # small shards, so that two workers share the few questions evenly


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


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that may begin a run."""
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the embedded models of the pipeline and, without --dataset_path, the embedded data",
    )
    parser.add_argument(
        "--failures_ok",
        action="store_true",
        help="exit 0 where it would be 2, for launchers that take any other status for a "
        "crash; `status --check` tells afterwards",
    )
