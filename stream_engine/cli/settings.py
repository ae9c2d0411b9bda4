"""The settings of a command: from its line, a file, the run on hand, and the embedded default."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from stream_engine.cli.command import work_dir_of
from stream_engine.cli.flags import read_settings
from stream_engine.cli.run_file import entries_of, settings_in_file
from stream_engine.config import RunConfig
from stream_engine.demo import DEMO_COUNT, DEMO_SEED, demo_models
from stream_engine.errors import ChangedError, ConfigError
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.refusals import DEMO_DATASET
from stream_engine.run_dir.run_json import kept_settings, merged_sources, read_run_file, shown
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.store.locations import canonical_source, is_hub_model

DEMO_SHARD = 32  # small shards, so that two workers share the few questions evenly


def config_from(
    args: argparse.Namespace, *, make_demo_data: bool = True, number: int | None = None
) -> RunConfig:
    """The settings of a command line alone (`run`, `plan`); `number` is of a round in its file."""
    given = read_settings(args, number=number)
    return RunConfig.create(with_demo(args, given, make_demo_data=make_demo_data))


@dataclass(frozen=True)
class Planned:
    """A round of a run file."""

    number: int
    of: int
    """How many rounds the file has."""
    config: RunConfig

    @property
    def missing_model(self) -> str | None:
        """A model of it that is not there: it may have to be trained first."""
        of_config = self.config
        settings = (
            *(of_config.instruct_model_path, of_config.reward_model_path),
            of_config.base_model_path,
        )
        paths = (path for setting in settings for path in (setting or "").split(",") if path)
        return next((path for path in paths if is_missing(path)), None)


def rounds_left(args: argparse.Namespace, *, make_demo_data: bool = True) -> list[Planned]:
    """The rounds of the file that a command line names, from the one at hand on; empty where it has
    none.

    Raises:
        ConfigError: for a value that does not fit, and where a round that is over was another one.
    """
    entries = entries_of(args)
    planned = []
    for number in range(1, len(entries) + 1):
        try:
            config = config_from(args, make_demo_data=make_demo_data, number=number)
        except ConfigError as error:
            what = str(error).removeprefix(f"{args.config}: ")
            raise ConfigError(f"{args.config}: round {number}: {what}") from error
        planned.append(Planned(number, len(entries), config))
    if not planned or not files.exists(RunDir(planned[0].config.work_dir).run_json):
        return planned
    run_file = read_run_file(RunDir(planned[0].config.work_dir))
    at_hand = run_file.fingerprints.at_hand
    if at_hand > len(entries):
        raise ConfigError(
            f"{args.config} has {len(entries)} rounds, but the run is at round {at_hand}: add the "
            "others, or give another work_dir"
        )
    for entry, one, over in zip(entries, planned, run_file.rounds):
        now = kept_settings(one.config)
        for name in entry:
            if now[name] != over.settings[name]:
                raise ConfigError(
                    f"{args.config}: round {one.number} is over, and had {name} "
                    f"{shown(over.settings[name])}, not {shown(now[name])}: put that back, or give "
                    "another work_dir"
                )
    sources = run_file.settings["dataset_path"]
    return [
        replace(one, config=replace(one.config, dataset_path=with_those(sources, one.config)))
        for one in planned[at_hand - 1 :]
    ]


def with_those(sources: Sequence[str], config: RunConfig) -> tuple[str, ...]:
    """The inputs of these settings, after those that the run has."""
    return tuple(merged_sources(sources, [canonical_source(one) for one in config.dataset_path]))


def is_missing(path: str) -> bool:
    """Whether a model is a folder of this machine that is not there."""
    return not ("://" in path or is_hub_model(path) or os.path.exists(os.path.expanduser(path)))


def config_of_run(args: argparse.Namespace, *, may_be_new: bool = False) -> RunConfig:
    """The settings kept in a run, with those of the command line over them."""
    args.work_dir = work_dir_of(args)
    in_file = settings_in_file(args.config)
    work_dir = args.work_dir or in_file.get("work_dir", RunConfig().work_dir)
    run_dir = RunDir(work_dir)
    if may_be_new and not files.exists(run_dir.run_json):
        return config_from(args)
    base = read_run_file(run_dir).settings
    if args.pipeline_name is None and "pipeline_name" not in in_file:
        args.pipeline_name = base["pipeline_name"]  # whose options the line may have
    config = RunConfig.create(read_settings(args, base | {"work_dir": work_dir}))
    sources = merged_sources(base["dataset_path"], config.dataset_path)
    return replace(config, dataset_path=tuple(sources))


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
