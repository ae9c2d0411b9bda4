"""RunDir: the only place that spells a path of the run directory.

It knows names, not contents, and creates nothing. An empty file stands for a removed one.

The run directory is a folder, or a place in object storage.

    run.json                       settings, fingerprints, versions
    shards/000012.tar              samples; shards/manifest.jsonl and, when that is full,
                                   manifest-00001.jsonl and so on, the list of shards
    results/<stage>/000012.msgpack
    results/<stage>.headers        what the headers of these say; may be deleted
    rankings/000012.msgpack        what ranking made of a shard; may be deleted
    rankings/trl.milestones        what a merge had counted up to some shards; may be deleted
    damaged/<stage>-000012.msgpack results whose bytes were found changed, kept to be looked at
    failures/000012.json           why a shard failed
    quarantine/*.jsonl             records set aside, with their reasons; a name ends in random
                                   digits, and a result's header or the manifest tells it
    leases/  logs/  debug/
    dataset/                       the first output format; others in dataset_<format>/; its files
                                   stand in outputs/publication.py
    rounds/2/dataset/              the same of the pairs of one round, where there are several
    report/index.html
"""

from __future__ import annotations

from collections.abc import Sequence

from stream_engine.store.base import Location
from stream_engine.store.files import location


class RunDir:
    """The paths of one run. `stage` is "rollouts" or "rewards"; shards are counted from 0."""

    def __init__(self, root: str | Location) -> None:
        """Name the run's folder: a path, or a URL of an object store.

        Raises:
            ConfigError: when it is another kind of URL.
        """
        self.root = location(root, setting="work_dir")

    def __repr__(self) -> str:
        return f"RunDir({str(self.root)!r})"

    @property
    def run_json(self) -> Location:
        return self.root / "run.json"

    @property
    def shards_dir(self) -> Location:
        return self.root / "shards"

    @property
    def manifest(self) -> Location:
        return self.manifest_part(0)

    def manifest_part(self, number: int) -> Location:
        """The manifest is written in parts, each full before the next is begun."""
        return self.shards_dir / (f"manifest-{number:05d}.jsonl" if number else "manifest.jsonl")

    def shard(self, index: int) -> Location:
        return self.shards_dir / f"{index:06d}.tar"

    def results_dir(self, stage: str) -> Location:
        return self.root / "results" / stage

    def result(self, stage: str, index: int) -> Location:
        return self.results_dir(stage) / self.result_name(index)

    def result_name(self, index: int) -> str:
        return f"{index:06d}.msgpack"

    def headers(self, stage: str) -> Location:
        return self.root / "results" / f"{stage}.headers"

    @property
    def rankings_dir(self) -> Location:
        return self.root / "rankings"

    def ranking(self, index: int) -> Location:
        return self.rankings_dir / f"{index:06d}.msgpack"

    def milestones(self, format: str, number: int | None = None) -> Location:
        """What the last merge, of all rounds or one, had counted up to some shards."""
        name = format if number is None else f"{format}-{number}"
        return self.rankings_dir / f"{name}.milestones"

    def damaged(self, stage: str, index: int) -> Location:
        """Where a result goes whose bytes are not those that were written."""
        return self.root / "damaged" / f"{stage}-{index:06d}.msgpack"

    @property
    def failures_dir(self) -> Location:
        return self.root / "failures"

    def failure(self, index: int) -> Location:
        return self.failures_dir / self.failure_name(index)

    def failure_name(self, index: int) -> str:
        return f"{index:06d}.json"

    @property
    def quarantine_dir(self) -> Location:
        return self.root / "quarantine"

    def quarantine(self, name: str) -> Location:
        """A file of records that were set aside, by the name that its result or input gives."""
        return self.quarantine_dir / name

    @property
    def leases_dir(self) -> Location:
        return self.root / "leases"

    def lease(self, name: str) -> Location:
        return self.leases_dir / self.lease_name(name)

    def lease_name(self, name: str) -> str:
        return f"{name}.json"

    @property
    def logs_dir(self) -> Location:
        return self.root / "logs"

    def log(self, rank_name: str) -> Location:
        return self.logs_dir / f"{rank_name}.log"

    @property
    def debug_dir(self) -> Location:
        return self.root / "debug"

    @property
    def dataset_dir(self) -> Location:
        return self.root / "dataset"

    def export_dir(self, format: str) -> Location:
        """The folder of a format besides the first."""
        return self.root / f"dataset_{format}"

    def dataset_folders(self, formats: Sequence[str]) -> dict[str, Location]:
        """Each format's own folder, so that each loads with `load_dataset(folder)`.

        The first is `dataset_dir`, whichever it is.
        """
        return {
            name: self.export_dir(name) if i else self.dataset_dir for i, name in enumerate(formats)
        }

    def of_round(self, number: int) -> RunDir:
        """Where the datasets of one round alone lie, by the names that a run's have."""
        return RunDir(self.root / "rounds" / str(number))

    @property
    def stats_json(self) -> Location:
        return self.dataset_dir / "stats.json"

    @property
    def report_html(self) -> Location:
        return self.root / "report" / "index.html"
