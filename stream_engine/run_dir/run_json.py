"""run.json: the settings of a run, and what each stage was made from.

Promise: results of different settings never mix. Each stage has a flat table of inputs (checkpoint
fingerprints, sampling values, the pipeline's own settings); its fingerprint is their hash, and
every result file carries it. When an input changes after results were made, the run is refused
with the names of what changed, or (`--overwrite`) exactly those stages' results are discarded.

run.json is changed by replacing the very content that the change was made from; where another
process was faster the change is made again, from what that one wrote.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import msgspec

from stream_engine.config import (
    STAGES,
    OutputConfig,
    RankingConfig,
    RunConfig,
    Stage,
    names_of,
)
from stream_engine.errors import (
    ChangedError,
    ConfigError,
    RoundOverError,
    SettingsChangedError,
    ShardReadError,
)
from stream_engine.records import SCHEMA_VERSION
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_header
from stream_engine.run_dir.rounds import Fingerprints, Round, StageInputs, fingerprints_of
from stream_engine.run_dir.sealed import is_broken, sealed
from stream_engine.run_dir.state import SHARD_LEASE, by_index, numbered
from stream_engine.run_dir.versions import versions
from stream_engine.store import files
from stream_engine.store.base import Version
from stream_engine.store.leases import list_leases
from stream_engine.store.locations import canonical_source, is_hub_model

PATH_SETTINGS = (
    "work_dir",
    "image_root",
    "instruct_model_path",
    "reward_model_path",
    "base_model_path",
    "vision_tower_path",
)
POLL_S = 0.05
FEW_NAMES = 32


class RunFile(msgspec.Struct, kw_only=True):
    """The content of run.json.

    `engines` is what each role's engine said of itself when it was first loaded under these
    settings, with the stage that it works at. All is of the round at hand but `rounds`.
    """

    schema_version: int = SCHEMA_VERSION
    created: float = 0.0
    settings: dict[str, Any]
    stages: dict[Stage, StageInputs] = {}
    versions: dict[str, str] = {}
    engines: dict[str, dict[str, Any]] = {}
    first_shard: int = 0
    """Of the round at hand."""
    rounds: list[Round] = []
    """Those that are over."""

    @property
    def fingerprints(self) -> Fingerprints:
        earlier = [(one.first_shard, one.fingerprints) for one in self.rounds]
        return Fingerprints(fingerprints_of(self.stages), earlier, self.first_shard)

    @property
    def every_round(self) -> list[Round | RunFile]:
        """What is kept of each round, in order; the file itself is of the last one."""
        return [*self.rounds, self]

    def config(self) -> RunConfig:
        """The settings as a RunConfig again."""
        return RunConfig.create(self.settings)


def read_run_file(run_dir: RunDir) -> RunFile:
    """The run.json of an existing run.

    Raises:
        ConfigError: when there is none, or it cannot be read.
    """
    run_file, _ = read_with_version(run_dir)
    if run_file is None:
        raise ConfigError(f"{run_dir.root} holds no run (no run.json)")
    return run_file


def read_with_version(run_dir: RunDir) -> tuple[RunFile | None, Version | None]:
    """The run.json of a run, and its version; None without one.

    Raises:
        ConfigError: when it cannot be read.
    """
    try:
        found = files.read(run_dir.run_json)
        if found is None:
            return None, None
        run_file = msgspec.json.decode(found[0], type=RunFile)
    except OSError as error:
        raise ConfigError(f"cannot read {run_dir.run_json}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {run_dir.run_json}: {error}; put a copy back") from error
    if is_broken(found[0]):
        raise ConfigError(
            f"{run_dir.run_json} is not what was written, so its settings cannot be relied on. Put "
            "a copy of it back, or take its line `checksum` out if it was changed on purpose"
        )
    refuse_unknown(run_dir, run_file)
    return run_file, found[1].version


def refuse_unknown(run_dir: RunDir, run_file: RunFile) -> None:
    """Raise ConfigError for a run.json that this version cannot go by."""
    unknown = sorted(run_file.settings.keys() - set(names_of(RunConfig)))
    if unknown or run_file.schema_version > SCHEMA_VERSION:
        what = f"settings {', '.join(unknown)}" if unknown else f"schema {run_file.schema_version}"
        raise ConfigError(
            f"{run_dir.run_json}: this version of stream_engine does not know {what}: take the one "
            f"that made the run ({run_file.versions.get('stream_engine', 'a newer one')}) or newer"
        )
    if missing := [stage for stage in STAGES if stage not in run_file.stages]:
        raise ConfigError(
            f"{run_dir.run_json}: `stages` lacks {', '.join(missing)}; put a copy of the file back"
        )


def open_run(
    run_dir: RunDir,
    config: RunConfig,
    stages: Mapping[Stage, StageInputs],
    number: int | None = None,
) -> tuple[RunFile, list[str]]:
    """Make run.json, or hold these settings against it; returns it with notes for the user.

    `stages` is what shapes each stage's results under these settings, which are those of the round
    `number` if that is told.

    Raises:
        RoundOverError: when the run has gone on from that round.
        SettingsChangedError: when results on hand were made by other settings.
    """
    settings = kept_settings(config)
    notes: list[str] = []

    def settle(run_file: RunFile | None) -> RunFile:
        notes.clear()
        if run_file is None:
            return RunFile(
                created=time.time(),
                settings=settings,
                stages=dict(stages.items()),
                versions=versions(),
            )
        if number is not None and number < run_file.fingerprints.at_hand:
            raise RoundOverError(f"the run has gone on from round {number}")
        notes.extend(_settle_changes(run_dir, run_file, stages, overwrite=config.overwrite))
        if files.exists(run_dir.stats_json):
            notes.extend(ranking_changes(run_file, config))
        return with_settings(run_file, settings, stages)

    return change(run_dir, settle), notes


def with_settings(
    run_file: RunFile, settings: Mapping[str, Any], stages: Mapping[Stage, StageInputs]
) -> RunFile:
    """The content of run.json under other settings; what it was given before it keeps."""
    kept = dict(settings)
    before, now = run_file.settings["dataset_path"], settings["dataset_path"]
    if not set(before) <= set(now):  # something is added, with limits of its own
        for name in ("max_samples", "questions"):
            kept[name] = run_file.settings.get(name)
    kept["dataset_path"] = merged_sources(before, now)
    unchanged = [stage for stage in STAGES if run_file.stages[stage] == stages[stage]]
    engines = {
        role: said for role, said in run_file.engines.items() if said.get("stage") in unchanged
    }
    return msgspec.structs.replace(
        run_file, settings=kept, stages=dict(stages.items()), engines=engines
    )


def forget_source(run_dir: RunDir, source: str) -> None:
    """Take an input that was refused out of the settings, so that no later run reads it."""

    def without(run_file: RunFile | None) -> RunFile:
        assert run_file is not None, "the run was opened before"
        left = [path for path in run_file.settings["dataset_path"] if path != source]
        return msgspec.structs.replace(
            run_file, settings={**run_file.settings, "dataset_path": left}
        )

    change(run_dir, without)


def change(run_dir: RunDir, changed: Callable[[RunFile | None], RunFile]) -> RunFile:
    """Replace run.json by what `changed` makes of it; it is called again if others were faster."""
    while True:
        before, version = read_with_version(run_dir)
        after = changed(before)
        if after == before:
            return after
        encoded = sealed(as_read_back(msgspec.to_builtins(after, order="deterministic")))
        try:
            files.replace(run_dir.run_json, encoded, version)
        except ChangedError:
            time.sleep(POLL_S * random.random())
        else:
            return after


def _settle_changes(
    run_dir: RunDir, run_file: RunFile, stages: Mapping[Stage, StageInputs], *, overwrite: bool
) -> list[str]:
    """Refuse changed settings that feed results on hand, or discard those results."""
    stale = [
        stage for stage in STAGES if run_file.stages[stage].fingerprint != stages[stage].fingerprint
    ]
    first = run_file.first_shard
    with_results = [stage for stage in stale if has_results(run_dir, stage, first)]
    changes = changed_inputs(run_file.stages, stages)
    if not with_results:
        return []
    what = f"{', '.join(changes)}; results on hand of: {', '.join(with_results)}"
    if not overwrite:
        made = f"round {len(run_file.rounds) + 1} of " if run_file.rounds else ""
        raise SettingsChangedError(
            f"settings changed since {made}{run_dir.root} was made: {what}. Give --overwrite to "
            "discard exactly these, or another --work_dir; or answer the next questions so by "
            "`stream-engine round`"
        )
    if workers := at_work(run_dir):
        raise SettingsChangedError(
            f"cannot discard results while workers are at it: {', '.join(workers)}"
        )
    for stage in with_results:
        discard(run_dir, stage, keep=stages[stage].fingerprint, first_shard=first)
    return [f"settings changed ({', '.join(changes)}): discarded {', '.join(with_results)}"]


def changed_inputs(
    before: Mapping[Stage, StageInputs], stages: Mapping[Stage, StageInputs]
) -> list[str]:
    """`name old -> new` for every input that differs."""
    changes: dict[str, None] = {}
    for stage in STAGES:
        old, new = before[stage].inputs, stages[stage].inputs
        for name in sorted(old.keys() | new.keys()):
            if name != "rollouts" and old.get(name) != new.get(name):
                changes[f"{name} {shown(old.get(name))} -> {shown(new.get(name))}"] = None
    return list(changes)


def ranking_changes(run_file: RunFile, config: RunConfig) -> list[str]:
    """A note when settings of the last stage alone changed: only the merge is done again."""
    names = [*names_of(RankingConfig), *names_of(OutputConfig)]
    names.remove("report")  # it changes no pair
    before = run_file.config()
    changes = [
        f"{name} {shown(getattr(before, name))} -> {shown(getattr(config, name))}"
        for name in names
        if getattr(before, name) != getattr(config, name)
    ]
    if not changes:
        return []
    return [f"changed: {', '.join(changes)}; pairs are built again from the results on hand"]


def at_work(run_dir: RunDir) -> list[str]:
    """The workers that hold a shard."""
    return [
        lease.worker_id
        for lease in list_leases(run_dir.leases_dir)
        if lease.name.startswith(SHARD_LEASE) and not lease.is_stale
    ]


def has_results(run_dir: RunDir, stage: Stage, first_shard: int = 0) -> bool:
    """Whether a shard from this one on has a result of a stage; a few names mostly tell."""
    folder, names = run_dir.results_dir(stage), count()
    few = by_index(files.list_files(folder, wanted=lambda name: next(names) < FEW_NAMES))
    return max(few, default=-1) >= first_shard or any(i >= first_shard for i, _ in numbered(folder))


def discard(run_dir: RunDir, stage: Stage, *, keep: str, first_shard: int = 0) -> None:
    """Remove a stage's results and their quarantined records, but those of the fingerprint `keep`
    and those of shards before `first_shard`, which other rounds made.

    What ranking made of them goes too.

    Failures are of settings, too, and count under those alone.
    """
    for index, entry in numbered(run_dir.rankings_dir):
        if index >= first_shard:
            with suppress(ChangedError):  # it is of no use to anybody, and nobody reads it as if
                files.remove(entry.path, entry.version, durable=False)
    for index, entry in numbered(run_dir.results_dir(stage)):
        if index < first_shard:
            continue
        while (version := files.version_of(entry.path)) is not None:
            quarantine = ""
            with suppress(ShardReadError):
                header = read_header(entry.path)
                if header.fingerprint == keep:
                    break
                quarantine = header.quarantine
            with suppress(ChangedError):  # or a removal that was interrupted is through now
                files.remove(entry.path, version)
            if quarantine and not files.exists(entry.path):
                files.erase(run_dir.quarantine(quarantine))


def kept_settings(config: RunConfig) -> dict[str, Any]:
    """The settings as run.json keeps them: with absolute paths, and without what is of one call."""
    settings = as_read_back(config.to_dict())
    settings["dataset_path"] = [canonical_source(source) for source in config.dataset_path]
    for name in PATH_SETTINGS:
        if settings[name]:
            paths = settings[name].split(",")
            settings[name] = ",".join(map(kept_path, paths))
    settings["overwrite"], settings["run_stage"] = False, None
    return settings


def kept_path(path: str) -> str:
    """A path that holds wherever the run is resumed from; a URL, and a model of the hub, as is."""
    if is_hub_model(path):
        return path
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def as_read_back(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values as JSON returns them (tuples become lists), so that equal ones compare equal."""
    return msgspec.json.decode(msgspec.json.encode(values))


def merged_sources(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """All datasets that a run was given, in the order in which they came."""
    return list(dict.fromkeys((*before, *now)))


def shown(value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
