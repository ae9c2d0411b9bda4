"""What a worker looks at, and in which order it takes shards: little, and not what all take."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.config import STAGES, RunConfig
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import RunState
from stream_engine.store import files
from stream_engine.work.order import in_order
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
    for rank in range(4):
        worker = worker_of(config, rank, 4)
        shards = {shard.index: shard for shard in worker.state.shards}
        order = in_order(shards, {}, worker.rank, total=NUM_SHARDS)
        orders.append([shard.index for shard in order])
    for rank, order in enumerate(orders):
        assert order[:6] == [rank + 4 * i for i in range(6)]
        assert sorted(order) == list(range(NUM_SHARDS))
    assert len({order[6] for order in orders}) == 4


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
