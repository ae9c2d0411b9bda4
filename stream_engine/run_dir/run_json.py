"""run.json: the settings of a run, and what each stage was made from.

Promise: results of different settings never mix. Each stage has a flat table of inputs (checkpoint
fingerprints, sampling values, the pipeline's own settings); its fingerprint is their hash, and
every result file carries it. When an input changes after results were made, the run is refused
with the names of what changed, or (`--overwrite`) exactly those stages' results are discarded.

Every change of run.json happens under the "run" lease.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from stream_engine import __version__
from stream_engine.config import (
    STAGES,
    OutputConfig,
    RankingConfig,
    RunConfig,
    Stage,
    names_of,
)
from stream_engine.errors import ConfigError, SettingsChangedError
from stream_engine.records import SCHEMA_VERSION
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import SHARD_LEASE
from stream_engine.store.atomic import is_temporary, write_atomic
from stream_engine.store.leases import Lease, list_leases
from stream_engine.store.locations import canonical_source, is_hub_model

VERSIONED_PACKAGES = ("torch", "transformers", "tokenizers", "webdataset", "pyarrow", "pillow")
KNOWN_NAMES = frozenset(
    (
        "run.json",
        "shards",
        "results",
        "damaged",
        "failures",
        "quarantine",
        "leases",
        "logs",
        "debug",
        "report",
    )
)
DEMO_DATASET = "demo-questions.parquet"
PATH_SETTINGS = (
    "work_dir",
    "image_root",
    "instruct_model_path",
    "reward_model_path",
    "vision_tower_path",
)
POLL_S = 0.05


class StageInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What shaped a stage's results, flat, and its hash."""

    fingerprint: str
    inputs: dict[str, Any]


class RunFile(msgspec.Struct, kw_only=True):
    """The content of run.json.

    `engines` is what each role's engine said of itself when it was first loaded under these
    settings, with the stage that it works at.
    """

    schema_version: int = SCHEMA_VERSION
    created: float = 0.0
    settings: dict[str, Any]
    stages: dict[str, StageInputs] = {}
    versions: dict[str, str] = {}
    engines: dict[str, dict[str, Any]] = {}

    @property
    def fingerprints(self) -> dict[Stage, str]:
        return {stage: self.stages[stage].fingerprint for stage in STAGES}

    def config(self) -> RunConfig:
        """The settings as a RunConfig again."""
        return RunConfig.create(self.settings)


def read_run_file(run_dir: RunDir) -> RunFile:
    """The run.json of an existing run.

    Raises:
        ConfigError: when there is none, or it cannot be read.
    """
    try:
        return msgspec.json.decode(run_dir.run_json.read_bytes(), type=RunFile)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_dir.root} holds no run (no run.json)") from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {run_dir.run_json}: {error}") from error


def open_run(
    run_dir: RunDir, config: RunConfig, stages: Mapping[Stage, StageInputs], *, worker: str
) -> tuple[RunFile, list[str]]:
    """Make run.json, or hold these settings against it; returns it with notes for the user.

    `stages` is what shapes each stage's results under these settings.

    Raises:
        SettingsChangedError: when results on hand were made by other settings.
    """
    settings = kept_settings(config)
    with changing(run_dir, worker):
        if not run_dir.run_json.exists():
            run_file = RunFile(
                created=time.time(),
                settings=settings,
                stages=dict(stages.items()),
                versions=versions(),
            )
            save(run_dir, run_file)
            return run_file, []
        run_file = read_run_file(run_dir)
        notes = _settle_changes(run_dir, run_file, stages, overwrite=config.overwrite)
        if run_dir.stats_json.exists():
            notes += ranking_changes(run_file, config)
        before, now = run_file.settings["dataset_path"], settings["dataset_path"]
        if not set(before) <= set(now):  # something is added, with a limit of its own
            settings["max_samples"] = run_file.settings["max_samples"]
        settings["dataset_path"] = merged_sources(before, now)
        if run_file.settings != settings or run_file.stages != stages:
            unchanged = [stage for stage in STAGES if run_file.stages[stage] == stages[stage]]
            run_file.engines = {
                role: said
                for role, said in run_file.engines.items()
                if said.get("stage") in unchanged
            }
            run_file.settings = settings
            run_file.stages = dict(stages.items())
            save(run_dir, run_file)
        return run_file, notes


def forget_source(run_dir: RunDir, source: str, *, worker: str) -> None:
    """Take an input that was refused out of the settings, so that no later run reads it."""
    with changing(run_dir, worker):
        run_file = read_run_file(run_dir)
        before = run_file.settings["dataset_path"]
        run_file.settings["dataset_path"] = [path for path in before if path != source]
        save(run_dir, run_file)


def refuse_foreign(run_dir: RunDir) -> None:
    """Raise ConfigError when the folder holds files, but no run."""
    if run_dir.run_json.exists() or not run_dir.root.exists():
        return
    if not run_dir.root.is_dir():
        raise ConfigError(f"work_dir {run_dir.root} is not a folder")
    foreign = [
        path.name
        for path in sorted(run_dir.root.iterdir())
        if path.name not in KNOWN_NAMES | {DEMO_DATASET}
        and not path.name.startswith("dataset")
        and not is_temporary(path)
    ]
    if foreign:
        raise ConfigError(
            f"work_dir {run_dir.root} holds other files ({', '.join(foreign[:3])}) and no run; "
            "give a new or empty folder"
        )


def refuse_unwritable(run_dir: RunDir) -> None:
    """Raise ConfigError when nothing can be written at the work directory, before it is made."""
    place = run_dir.root.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"work_dir {run_dir.root} cannot be made: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"work_dir {run_dir.root} cannot be written: no access to {place}")


def refuse_no_input(run_dir: RunDir, config: RunConfig) -> None:
    """Raise ConfigError when neither the settings nor the run name an input."""
    if not config.dataset_path and not run_dir.manifest.exists():
        raise ConfigError("no input: give --dataset_path (or --demo)")


def _settle_changes(
    run_dir: RunDir, run_file: RunFile, stages: Mapping[Stage, StageInputs], *, overwrite: bool
) -> list[str]:
    """Refuse changed settings that feed results on hand, or discard those results."""
    stale = [
        stage for stage in STAGES if run_file.stages[stage].fingerprint != stages[stage].fingerprint
    ]
    with_results = [stage for stage in stale if has_results(run_dir, stage)]
    changes = changed_inputs(run_file, stages)
    if not with_results:
        return []
    what = f"{', '.join(changes)}; results on hand of: {', '.join(with_results)}"
    if not overwrite:
        raise SettingsChangedError(
            f"settings changed since {run_dir.root} was made: {what}. Give --overwrite to discard "
            "exactly these, or another --work_dir"
        )
    if workers := at_work(run_dir):
        raise SettingsChangedError(
            f"cannot discard results while workers are at it: {', '.join(workers)}"
        )
    for stage in with_results:
        discard(run_dir, stage)
    return [f"settings changed ({', '.join(changes)}): discarded {', '.join(with_results)}"]


def changed_inputs(run_file: RunFile, stages: Mapping[Stage, StageInputs]) -> list[str]:
    """`name old -> new` for every input that differs."""
    changes: dict[str, None] = {}
    for stage in STAGES:
        old, new = run_file.stages[stage].inputs, stages[stage].inputs
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


def has_results(run_dir: RunDir, stage: Stage) -> bool:
    folder = run_dir.results_dir(stage)
    return folder.is_dir() and any(not is_temporary(path) for path in folder.iterdir())


def discard(run_dir: RunDir, stage: Stage) -> None:
    """Remove a stage's results, its quarantined records, and the failures of shards."""
    for folder, pattern in (
        (run_dir.results_dir(stage), "*.msgpack"),
        (run_dir.quarantine_dir, f"{stage}-*.jsonl"),
        (run_dir.failures_dir, "*.json"),
    ):
        for path in sorted(folder.glob(pattern)):
            path.unlink()


def note_engines(run_dir: RunDir, engines: Mapping[str, dict[str, Any]], *, worker: str) -> None:
    """Keep what the engines said of themselves: resolved sampling, family, dtype, device.

    Raises:
        ConfigError: when one is on another kind of device, or in another precision, than where it
            made results before, or makes them now.
    """
    with changing(run_dir, worker):
        run_file = read_run_file(run_dir)
        new = {}
        for role, said in engines.items():
            noted = run_file.engines.get(role, said)
            if precision(said) != precision(noted) and is_relied_on(run_dir, noted, worker):
                raise ConfigError(
                    f"{role} would run here on {' in '.join(precision(said))}, but this run's "
                    f"{role} is on {' in '.join(precision(noted))}, and log-probs of different "
                    "precisions do not compare: mend this machine's devices (is the GPU driver "
                    "loaded?) or leave it out; to change the whole run, give another --work_dir"
                )
            if role not in run_file.engines or precision(said) != precision(noted):
                new[role] = said
        if new:
            run_file.engines |= new
            save(run_dir, run_file)


def precision(said: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of device and the dtype that an engine said it has."""
    return str(said["device"]).partition(":")[0], str(said["dtype"])


def is_relied_on(run_dir: RunDir, noted: Mapping[str, Any], worker: str) -> bool:
    """Whether results exist that a noted engine made, or other workers are at some."""
    return has_results(run_dir, noted["stage"]) or any(at != worker for at in at_work(run_dir))


def save(run_dir: RunDir, run_file: RunFile) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(run_file, order="deterministic"), indent=2)
    write_atomic(run_dir.run_json, encoded + b"\n")


@contextmanager
def changing(run_dir: RunDir, worker: str, *, name: str = "run") -> Iterator[Lease]:
    """Hold the lease under which run.json is changed; waits for it."""
    while (
        lease := Lease.acquire(run_dir.leases_dir, name, worker_id=worker, timeout_s=30.0)
    ) is None:
        time.sleep(POLL_S)
    with lease:
        yield lease


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
    """A path that holds wherever the run is resumed from; a model of the hub by its id."""
    return path if is_hub_model(path) else os.path.abspath(os.path.expanduser(path))


def as_read_back(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values as JSON returns them (tuples become lists), so that equal ones compare equal."""
    return msgspec.json.decode(msgspec.json.encode(values))


def merged_sources(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """All datasets that a run was given, in the order in which they came."""
    return list(dict.fromkeys((*before, *now)))


def versions() -> dict[str, str]:
    """Versions of python, this package, and what shapes results beneath it."""
    found = {"python": platform.python_version(), "stream_engine": __version__}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shown(value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
