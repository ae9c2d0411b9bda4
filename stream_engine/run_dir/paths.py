"""RunDir: the only place that spells a path of the run directory.

It knows names, not contents, and creates nothing: writers make the folders they need.

    run.json                       settings, fingerprints, versions
    shards/000012.tar              samples, and shards/manifest.jsonl, the list of shards
    results/<stage>/000012.msgpack
    damaged/<stage>-000012.msgpack results whose bytes were found changed, kept to be looked at
    failures/000012.json           why a shard failed
    quarantine/*.jsonl             records set aside, with their reasons
    leases/  logs/  debug/
    dataset/                       the first output format; others in dataset_<format>/
    report/index.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stream_engine.errors import ConfigError


class RunDir:
    """The paths of one run. `stage` is "rollouts" or "rewards"; shards are counted from 0."""

    def __init__(self, root: str | Path) -> None:
        """Name the run's folder.

        Raises:
            ConfigError: when it is a URL.
        """
        self.root = folder_on_disk(root, setting="work_dir")

    def __repr__(self) -> str:
        return f"RunDir({str(self.root)!r})"

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def shards_dir(self) -> Path:
        return self.root / "shards"

    @property
    def manifest(self) -> Path:
        return self.shards_dir / "manifest.jsonl"

    def shard(self, index: int) -> Path:
        return self.shards_dir / f"{index:06d}.tar"

    def results_dir(self, stage: str) -> Path:
        return self.root / "results" / stage

    def result(self, stage: str, index: int) -> Path:
        return self.results_dir(stage) / f"{index:06d}.msgpack"

    def damaged(self, stage: str, index: int) -> Path:
        """Where a result goes whose bytes are not those that were written."""
        return self.root / "damaged" / f"{stage}-{index:06d}.msgpack"

    @property
    def failures_dir(self) -> Path:
        return self.root / "failures"

    def failure(self, index: int) -> Path:
        return self.failures_dir / f"{index:06d}.json"

    @property
    def quarantine_dir(self) -> Path:
        return self.root / "quarantine"

    def quarantine(self, name: str) -> Path:
        """`name` is `input-<hash of the source>` or `<stage>-<shard>`."""
        return self.quarantine_dir / f"{name}.jsonl"

    def stage_quarantine(self, stage: str, index: int) -> Path:
        """The records of one shard that a stage set aside."""
        return self.quarantine(f"{stage}-{index:06d}")

    @property
    def leases_dir(self) -> Path:
        return self.root / "leases"

    def lease(self, name: str) -> Path:
        return self.leases_dir / f"{name}.json"

    @property
    def logs_dir(self) -> Path:
        return self.root / "logs"

    def log(self, rank_name: str) -> Path:
        return self.logs_dir / f"{rank_name}.log"

    @property
    def debug_dir(self) -> Path:
        return self.root / "debug"

    @property
    def dataset_dir(self) -> Path:
        return self.root / "dataset"

    def export_dir(self, format: str) -> Path:
        """The folder of a format besides the first."""
        return self.root / f"dataset_{format}"

    def dataset_folders(self, formats: Sequence[str]) -> dict[str, Path]:
        """Each format's own folder, so that each loads with `load_dataset(folder)`.

        The first is `dataset_dir`, whichever it is.
        """
        return {
            name: self.export_dir(name) if i else self.dataset_dir for i, name in enumerate(formats)
        }

    @property
    def stats_json(self) -> Path:
        return self.dataset_dir / "stats.json"

    @property
    def report_html(self) -> Path:
        return self.root / "report" / "index.html"


def folder_on_disk(path: str | Path, *, setting: str) -> Path:
    """The folder that a setting names for what is written.

    Raises:
        ConfigError: for a URL, which as a path would be a local folder named `s3:`.
    """
    if "://" in str(path):
        raise ConfigError(
            f"{setting} {str(path)!r} is a URL; it must be a folder on a disk that every worker "
            "mounts, since files are put in place by renames and hard links, which stores do not "
            "have. Mount the store, or copy the dataset's folder there afterwards"
        )
    return Path(path)
