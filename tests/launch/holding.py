"""Shards that a test holds, so that workers stand where it wants them; and those at work.

And a run file of two rounds, of which the first is the tests' plain run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stream_engine.demo.data import write_dataset
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import shard_lease
from stream_engine.store.leases import Lease, LeaseInfo, list_leases
from tests.conftest import rows_file


def hold(run_dir: RunDir, index: int) -> Lease:
    lease = Lease.acquire(run_dir.leases_dir, shard_lease(index), worker_id="test", timeout_s=600)
    assert lease is not None
    return lease


def at_work(run_dir: RunDir) -> list[LeaseInfo]:
    """The leases that workers hold on shards."""
    return [
        lease
        for lease in list_leases(run_dir.leases_dir)
        if lease.name.startswith("shard") and lease.worker_id != "test" and lease.is_alive
    ]


def two_rounds(tmp_path: Path, questions: Path) -> Path:
    """A run file: a round that answers these questions, and one of three more."""
    more = write_dataset(tmp_path / "more.parquet", count=3, seed=6)
    path = tmp_path / "run.yaml"
    rounds = [{"dataset_path": str(questions)}, {"dataset_path": str(more)}]
    path.write_text(json.dumps({"work_dir": str(tmp_path / "run"), "rounds": rounds}))
    return path


def rows_of_round(dataset: Path, number: int) -> list[dict[str, Any]]:
    """The pairs of a round, as a run has them that knows no rounds."""
    rows = pq.read_table(rows_file(dataset)).to_pylist()
    return [row for row in rows if row.pop("round", 1) == number]
