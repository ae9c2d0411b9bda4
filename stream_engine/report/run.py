"""The run that a report is about: where it lies, its settings, and how its pairs are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stream_engine.config import RunConfig, Stage
from stream_engine.errors import MissingStageError
from stream_engine.pairs.merge_inputs import MergeInputs, read_inputs
from stream_engine.pipelines import pipeline_class
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import ShardInfo
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.status import read_stats
from stream_engine.store.base import Location


@dataclass(frozen=True)
class ReportedRun:
    """A run with results. `stats` is its dataset's stats.json; {} before the first merge."""

    run_dir: RunDir
    config: RunConfig
    pipeline: Pipeline
    inputs: MergeInputs
    stats: dict[str, Any]
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: float = 0.0

    @classmethod
    def of(
        cls,
        run_dir: RunDir,
        config: RunConfig,
        pipeline: Pipeline,
        fingerprints: Mapping[Stage, str],
        **said: Any,
    ) -> ReportedRun:
        """Look at what is there.

        Raises:
            MissingStageError: when no shard has results of both stages.
        """
        inputs = read_inputs(run_dir, fingerprints)
        if next(inputs.shards(), None) is None:
            raise MissingStageError(
                f"{run_dir.root} has no shard with scored answers; `stream-engine work` makes them"
            )
        return cls(run_dir, config, pipeline, inputs, read_stats(run_dir), **said)

    @classmethod
    def open(cls, root: str | Location) -> ReportedRun:
        """The run in a work directory.

        Raises:
            ConfigError: when there is none.
            MissingStageError: when nothing is scored yet.
        """
        run_dir = RunDir(root)
        run_file = read_run_file(run_dir)
        config = run_file.config()
        return cls.of(
            run_dir,
            config,
            pipeline_class(config.pipeline_name)(config),
            run_file.fingerprints,
            engines=run_file.engines,
            versions=run_file.versions,
            created=run_file.created,
        )

    def shards(self) -> Iterator[ShardInfo]:
        """The shards with results of both stages, in order."""
        return self.inputs.shards()

    def round_of(self, index: int) -> int | None:
        """The number of a shard's round; None in a run that has one."""
        return self.inputs.round_of(index) if self.inputs.fingerprints.at_hand > 1 else None

    @property
    def name(self) -> str:
        root = self.run_dir.root
        return (root.absolute() if isinstance(root, Path) else root).name

    @property
    def is_merged(self) -> bool:
        """Whether the dataset was made from the results that are there now."""
        config = self.config
        made_from = self.inputs.fingerprint(config, config.format[0])
        return self.stats.get("fingerprint") == made_from
