"""What an ingest left in a run, for tests of it."""

from __future__ import annotations

from stream_engine.config import InputConfig
from stream_engine.inputs.ingest import IngestReport
from stream_engine.records import Failure, Sample
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_quarantine
from stream_engine.run_dir.shards import read_shard
from tests.samples import make_row

CONFIG = InputConfig(samples_per_shard=4)


def samples_of(run_dir: RunDir) -> list[Sample]:
    return [
        sample
        for info in Manifest.load(run_dir).shards
        for sample in read_shard(run_dir.shard(info.index), info)
    ]


def ids_of(run_dir: RunDir) -> list[str]:
    return [sample.idx for sample in samples_of(run_dir)]


def quarantined(run_dir: RunDir) -> list[Failure]:
    return [
        failure
        for path in sorted(run_dir.quarantine_dir.iterdir())
        for failure in read_quarantine(path)
    ]


def counts(report: IngestReport) -> tuple[int, int, int, dict[str, int]]:
    return report.read, report.added, report.known, report.rejected


def numbers(first: int, last: int) -> list[dict]:
    return [make_row(i) for i in range(first, last)]
