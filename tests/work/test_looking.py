"""What a worker looks at, and in which order it takes shards: little, and not what all take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stream_engine.config import STAGES, RunConfig
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.failures import ShardFailure, write_failure
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import RunState, Shard, shard_lease
from stream_engine.store import files
from stream_engine.store.base import Entry
from stream_engine.store.leases import Lease
from stream_engine.store.local import LocalStore
from stream_engine.work.order import IDLE_S, in_order, looks_apart_s
from stream_engine.work.progress import ProgressView
from stream_engine.work.worker import Worker
from tests.echo_pipeline import echo_config
from tests.synthetic import FINGERPRINTS, synthetic_sample, write_run

pytestmark = pytest.mark.usefixtures("echo")

NUM_SHARDS = 24


def worker_of(config: RunConfig, rank: int, world_size: int) -> Worker:
    place = Rank(rank=rank, world_size=world_size, local_world_size=world_size, threads_set=True)
    pipeline = pipeline_class("echo")(config)
    view = ProgressView(silent=True)
    worker = Worker(RunDir(config.work_dir), config, pipeline, FINGERPRINTS, rank=place, view=view)
    worker.state.refresh()
    return worker


def failure_of(state: RunState, index: int, **what: Any) -> ShardFailure:
    """A shard's failure at the second stage."""
    words = {"error": "x", "traceback": "", "source": f"{index:06d}.tar", "attempts": 0}
    fingerprint = state.fingerprints["rewards"]
    return ShardFailure(shard=index, stage="rewards", fingerprint=fingerprint, **words | what)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a finished run of shards with one sample each."""
    write_run(
        RunDir(tmp_path / "run"),
        map(synthetic_sample, range(NUM_SHARDS)),
        samples_per_shard=1,
        sample_k=2,
    )
    return echo_config(tmp_path / "run", tmp_path / "questions.jsonl")


def test_workers_begin_with_their_own_and_go_on_at_places_of_their_own(config: RunConfig) -> None:
    """All went on with the last shard, and each asked for every lease that the others held."""
    orders = []
    run_dir = RunDir(config.work_dir)
    for path in Path(str(run_dir.results_dir("rewards"))).iterdir():
        path.unlink()
    for rank in range(4):
        worker = worker_of(config, rank, 4)
        orders.append(list(in_order(worker.state, STAGES, worker.shards, worker.rank)))
    for rank, order in enumerate(orders):
        assert order[:6] == [rank + 4 * i for i in range(6)]
        assert sorted(order) == list(range(NUM_SHARDS))
    assert len({order[6] for order in orders}) == 4
    for index, num_deaths in ((4, 2), (1, 1), (8, 1)):
        write_failure(run_dir, failure_of(worker.state, index, deaths={"": num_deaths}))
    worker.state.refresh()
    first = worker_of(config, 0, 4)
    order = list(in_order(first.state, STAGES, first.shards, first.rank))
    assert order[:2] == [0, 12] and order[-3:] == [8, 1, 4]
    assert list(in_order(first.state, STAGES, range(13, 20), first.rank)) == [
        16,
        *range(13, 16),
        17,
        18,
        19,
    ]


def test_a_worker_looks_at_all_results_only_before_it_ends(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it had nothing to take it read the attributes of every result."""
    looked: list[bool] = []
    look_for_results = RunState._refresh_results

    def noted(self: RunState, stage: str, *, only_missing: bool) -> None:
        looked.append(only_missing)
        look_for_results(self, stage, only_missing=only_missing)  # type: ignore[arg-type]

    run_dir = RunDir(config.work_dir)
    path = run_dir.result("rewards", 3)
    content, entry = files.read(path) or (b"", None)
    assert entry is not None
    files.remove(path, entry.version)
    worker = worker_of(config, 0, 1)
    monkeypatch.setattr(RunState, "_refresh_results", noted)
    worker.look(1)
    assert looked == [True] * len(STAGES)
    files.replace(path, content, files.version_of(path))
    looked.clear()
    worker.state._refreshed = float("-inf")
    worker.look(2)
    assert looked == [True, True, False, False]
    looked.clear()
    worker.state._refreshed = float("-inf")
    worker.look(3)
    assert looked == [True, True]


def test_where_few_are_left_only_their_files_are_asked_for(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand idle workers listed ten thousand results, and as many leases given back."""
    monkeypatch.setattr("stream_engine.run_dir.state.SHARDS_PER_FEW", NUM_SHARDS // 2)
    run_dir = RunDir(config.work_dir)
    done, left = files.read(run_dir.result("rewards", 3)), files.read(run_dir.result("rewards", 5))
    assert done is not None and left is not None
    for _, entry in (done, left):
        files.remove(entry.path, entry.version)
    state = worker_of(config, 0, 1).state
    assert set(state.unsettled(STAGES)) == {3, 5}
    lease = Lease.acquire(run_dir.leases_dir, shard_lease(5), worker_id="other", timeout_s=60)
    assert lease is not None
    shard = state.shards[5]
    write_failure(run_dir, failure_of(state, 5, attempts=9))
    files.replace(done[1].path, done[0], files.version_of(done[1].path))

    def refuse(self: LocalStore, folder: Path, wanted: object = None) -> list[Entry]:
        raise AssertionError(f"listed {folder}")

    monkeypatch.setattr(LocalStore, "list_files", refuse)
    state.refresh(only_missing=True)
    with lease:
        assert state.is_complete("rewards", state.shards[3])
        assert state.holders()[5].worker_id == "other"
        assert state.is_failed(shard)
    monkeypatch.setattr("stream_engine.run_dir.state.FEW_LEFT", 0)
    with pytest.raises(AssertionError, match="listed"):
        state.refresh(only_missing=True)


def test_what_others_have_done_is_not_looked_at_one_by_one(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that had done its own asked for the files of thousands that were done by now."""
    monkeypatch.setattr("stream_engine.work.order.MANY_DONE", 4)
    folder = Path(str(RunDir(config.work_dir).results_dir("rewards")))
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    for path in kept:
        path.unlink()
    worker = worker_of(config, 0, NUM_SHARDS)
    worker.current_pass = STAGES
    assert len(worker.state.missing(STAGES)) == NUM_SHARDS
    for path, content in kept.items():
        path.write_bytes(content)
    worker.state.refresh_shard(worker.state.shards[0])
    looked: list[int] = []
    look = RunState.refresh_shard

    def noted(self: RunState, shard: Shard) -> None:
        looked.append(shard.index)
        look(self, shard)

    monkeypatch.setattr(RunState, "refresh_shard", noted)
    assert worker.take() is None
    assert looked == [1, 2, 3, 4]
    assert not worker.state.missing(STAGES)


def test_many_workers_of_many_shards_look_less_often(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand had 64 folders of ten thousand names listed a second."""
    monkeypatch.setattr("stream_engine.work.order.MANY_SHARDS", NUM_SHARDS // 4)
    run_dir = RunDir(config.work_dir)
    for path in Path(str(run_dir.results_dir("rewards"))).iterdir():
        path.unlink()

    def apart_s(num_workers: int) -> float:
        worker = worker_of(config, 0, num_workers)
        return looks_apart_s(worker.state, worker.rank)

    assert [apart_s(count) for count in (1, 4, 8, 64)] == [IDLE_S, IDLE_S, 2 * IDLE_S, 16 * IDLE_S]
    monkeypatch.setattr("stream_engine.run_dir.state.SHARDS_PER_FEW", 1)
    assert apart_s(64) == 4 * IDLE_S
