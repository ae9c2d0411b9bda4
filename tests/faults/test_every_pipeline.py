"""The judging pipelines keep the promises too: any workers, any placement, kills, both schemas."""

from __future__ import annotations

import time
from pathlib import Path

import datasets
import pytest

from stream_engine.records import SampleRewards
from stream_engine.run_dir.results import read_results
from tests.conftest import answers, parts
from tests.processes import run_rank, start_rank

FLAGS = ("--demo", "--sample_k=4", "--rank=2", "--samples_per_shard=2", "--max_samples=6")


def scores(work_dir: Path) -> dict[str, list[float]]:
    return {
        record.key: [score.score for score in record.scores]
        for path in sorted((work_dir / "results/rewards").glob("*.msgpack"))
        for record in read_results(path, SampleRewards)
    }


@pytest.mark.parametrize("pipeline_name", ["divide_and_conquer", "llava_critic"])
def test_workers_placement_and_kills_shape_no_result(
    pipeline_name: str, demo_questions: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = ["run", *FLAGS, "--pipeline_name", pipeline_name, "--dataset_path", demo_questions]
    words += ["--format", "rlaifv,trl", "--work_dir"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_rank([*words, one, "--placement", "together"], log=log) == 0, log.read_text()
    staged = [*words, two, "--placement", "staged"]
    for pause in (1.0, 2.5):
        ranks = [start_rank(staged, rank=i, world_size=2, log=log) for i in range(2)]
        time.sleep(pause)
        for rank in ranks:
            rank.kill()
            rank.join()
    ranks = [start_rank(staged, rank=i, world_size=2, log=log) for i in range(2)]
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()
    assert len(answers(one)) == 6
    assert answers(two) == answers(one)
    assert scores(two) == scores(one)
    for folder in ("dataset", "dataset_trl"):
        assert parts(two / folder) == parts(one / folder)
        loaded = datasets.load_dataset(
            str(one / folder), cache_dir=str(tmp_path / "cache"), split="train"
        )
        assert len(loaded) > 0
    assert set(loaded.column_names) >= {"images", "prompt", "chosen", "rejected"}
