"""Synthetic runs as a report sees them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stream_engine.config import RunConfig
from stream_engine.records import Sample
from stream_engine.report.run import ReportedRun
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    run_merge,
    synthetic_sample,
    write_run,
)


def reported(run_dir: RunDir, **settings: object) -> ReportedRun:
    """A synthetic run under these settings."""
    config = RunConfig.create(settings)
    return ReportedRun.of(run_dir, config, SyntheticPipeline(config), FINGERPRINTS)


def merged_run(folder: Path, samples: Iterable[Sample] | int, **settings: object) -> ReportedRun:
    """A run of these samples, or so many, merged."""
    run_dir = RunDir(folder)
    if isinstance(samples, int):
        samples = [synthetic_sample(i) for i in range(samples)]
    write_run(run_dir, iter(samples), num_words=12)
    run_merge(run_dir, **settings)
    return reported(run_dir, **settings)
