"""Appending is incremental: finished shards are never touched, and nothing is added twice."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stream_engine.demo.data import write_dataset
from tests.conftest import DEMO_FLAGS, answers, file_states
from tests.processes import run_rank


def test_appending_50_new_and_50_old_samples_computes_the_new_ones_alone(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "first.parquet", count=60, seed=5)
    other = write_dataset(tmp_path / "other.parquet", count=50, seed=6)
    both = tmp_path / "both.parquet"
    pq.write_table(
        pa.concat_tables([pq.read_table(first).slice(0, 50), pq.read_table(other)]), both
    )
    run, log = tmp_path / "run", tmp_path / "log"
    flags = [*DEMO_FLAGS, "--samples_per_shard=20"]

    assert run_rank(["run", *flags, "--dataset_path", first, "--work_dir", run], log=log) == 0
    before = file_states(run / "results") | file_states(run / "shards")
    del before["manifest.jsonl"]
    assert len(answers(run)) == 60

    assert run_rank(["append", run, "--dataset_path", both], log=log) == 0, log.read_text()
    after = file_states(run / "results") | file_states(run / "shards")
    assert {name: after[name] for name in before} == before
    assert len(answers(run)) == 110
    assert sum(name.startswith("rollouts/") for name in after.keys() - before.keys()) == 3
    assert "50 new, 50 known" in log.read_text()
