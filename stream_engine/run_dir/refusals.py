"""What a work directory must be before a run begins in it: ours or empty, and writable."""

from __future__ import annotations

import os
from pathlib import Path

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files

KNOWN_NAMES = frozenset(
    (
        "run.json",
        "shards",
        "results",
        "rankings",
        "damaged",
        "failures",
        "quarantine",
        "leases",
        "logs",
        "debug",
        "report",
        "rounds",
    )
)
DEMO_DATASET = "demo-questions.parquet"


def refuse_foreign(run_dir: RunDir) -> None:
    """Raise ConfigError when the folder holds files, but no run."""
    if files.exists(run_dir.run_json):
        return
    root = run_dir.root
    if isinstance(root, Path) and root.exists() and not root.is_dir():
        raise ConfigError(f"work_dir {root} is not a folder")
    names = [path.name for path in files.list_folders(root)]
    names += [entry.name for entry in files.list_files(root)]
    foreign = [
        name
        for name in sorted(names)
        if name not in KNOWN_NAMES | {DEMO_DATASET} and not name.startswith("dataset")
    ]
    if foreign:
        raise ConfigError(
            f"work_dir {root} holds other files ({', '.join(foreign[:3])}) and no run; "
            "give a new or empty folder"
        )


def refuse_unwritable(run_dir: RunDir) -> None:
    """Raise ConfigError when nothing can be written at the work directory, before it is made."""
    if not isinstance(run_dir.root, Path):
        return  # a store says so when it is asked to write
    place = run_dir.root.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"work_dir {run_dir.root} cannot be made: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"work_dir {run_dir.root} cannot be written: no access to {place}")


def refuse_no_input(run_dir: RunDir, config: RunConfig) -> None:
    """Raise ConfigError when neither the settings nor the run name an input."""
    if not config.dataset_path and not files.exists(run_dir.manifest):
        raise ConfigError("no input: give --dataset_path (or --demo)")
