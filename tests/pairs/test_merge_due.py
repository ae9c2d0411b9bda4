"""When a merge is due, and when it is a no-op."""

from __future__ import annotations

import os

import msgspec
import pytest

from stream_engine.pairs import merger
from stream_engine.run_dir.paths import RunDir
from tests.conftest import rows_file
from tests.pairs.test_merger import is_current
from tests.synthetic import (
    run_merge,
    synthetic_sample,
    write_run,
)


def test_a_finished_merge_repeated_does_nothing(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_merge(run_dir, format=("rlaifv", "trl"))
    times = {p: p.stat().st_mtime_ns for p in run_dir.root.rglob("*")}
    monkeypatch.setattr(merger, "build", None)
    second = run_merge(run_dir, format=("rlaifv", "trl"))
    assert {p: p.stat().st_mtime_ns for p in run_dir.root.rglob("*")} == times
    assert (first.is_new, second.is_new) == (True, False)
    assert msgspec.structs.replace(second, is_new=True) == first
    assert is_current(run_dir, format=("rlaifv", "trl"))


def change_rank(run_dir: RunDir) -> dict:
    return {"rank": 2}


def add_shard_with_old_files(run_dir: RunDir) -> dict:
    """As after a copy that keeps times: the new results are older than the dataset."""
    write_run(run_dir, [synthetic_sample(50)])
    for path in run_dir.root.glob("results/*/*"):
        os.utime(path, (0, 0))
    return {}


def remove_part(run_dir: RunDir) -> dict:
    rows_file(run_dir.dataset_dir).unlink()
    return {}


def cut_part(run_dir: RunDir) -> dict:
    path = rows_file(run_dir.dataset_dir)
    path.write_bytes(path.read_bytes()[:-1])
    return {}


def add_shard(run_dir: RunDir) -> dict:
    write_run(run_dir, [synthetic_sample(50)])
    return {}


def rewrite_result(run_dir: RunDir) -> dict:
    path = run_dir.result("rewards", 0)
    later = run_dir.stats_json.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_rank,
        remove_part,
        cut_part,
        add_shard,
        add_shard_with_old_files,
        rewrite_result,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_makes_the_merge_due_again(run_dir: RunDir, change: object) -> None:
    run_merge(run_dir)
    settings = change(run_dir)
    assert not is_current(run_dir, **settings)
    assert run_merge(run_dir, **settings).is_new
