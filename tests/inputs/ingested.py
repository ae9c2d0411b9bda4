"""What an ingest left in a run, for tests of it."""

from __future__ import annotations

import re
from pathlib import Path

from stream_engine.config import InputConfig
from stream_engine.inputs.ingest import IngestReport
from stream_engine.records import Failure, Sample
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_quarantine
from stream_engine.run_dir.shards import read_shard
from stream_engine.store.local import is_temporary
from tests.samples import make_row, tree

CONFIG = InputConfig(samples_per_shard=4)
CHECKSUM = re.compile(rb'"checksum":"[0-9a-f]{8}"')
NAME = re.compile(rb"(input-[0-9a-f]{16})-[0-9a-f]{8}\.jsonl")


def samples_of(run_dir: RunDir) -> list[Sample]:
    return [
        sample
        for info in Manifest.load(run_dir).shards
        for sample in read_shard(run_dir.shard(info.index), info)
    ]


def ids_of(run_dir: RunDir) -> list[str]:
    return [sample.idx for sample in samples_of(run_dir)]


def quarantined(run_dir: RunDir) -> list[Failure]:
    inputs = Manifest.load(run_dir).inputs.values()
    names = [info.quarantine for info in inputs if info.quarantine]
    return [f for name in names for f in read_quarantine(run_dir.quarantine(name))]


def counts(report: IngestReport) -> tuple[int, int, int, dict[str, int]]:
    return report.read, report.added, report.known, report.rejected


def numbers(first: int, last: int) -> list[dict]:
    return [make_row(i) for i in range(first, last)]


def durable(root: Path) -> dict[str, bytes]:
    """What counts of a run, but for the names of quarantine files: every one is another."""
    found = {name: data for name, data in tree(root).items() if not is_temporary(name)}
    named = NAME.findall(found["shards/manifest.jsonl"])
    found["shards/manifest.jsonl"] = CHECKSUM.sub(b"", found["shards/manifest.jsonl"])
    bare = {NAME.sub(rb"\1", k.encode()).decode(): NAME.sub(rb"\1", v) for k, v in found.items()}
    assert {f"quarantine/{name.decode()}" for name in named} <= bare.keys()
    return bare
