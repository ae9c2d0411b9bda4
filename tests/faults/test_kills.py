"""kill -9 at any moment costs at most the shards in flight; the same command goes on."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.conftest import DEMO_FLAGS, answers, parts
from tests.processes import run_rank, start_rank

NUM_KILLS = 12


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_again_and_again_gives_the_undisturbed_dataset(
    seed: int, demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """Two ranks; one or both are killed at random moments, and started again."""
    rng = random.Random(seed)
    log = tmp_path / "log"
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", tmp_path / "run"]
    num_killed = 0
    for _ in range(NUM_KILLS // 2):
        ranks = [start_rank(words, rank=i, world_size=2, log=log) for i in range(2)]
        for rank in rng.sample(ranks, 2):
            time.sleep(rng.uniform(0.1, 1.2))
            num_killed += rank.is_alive()
            rank.kill()
        for rank in ranks:
            rank.join()
    assert num_killed > 2, "every rank had ended before it was killed; the moments are too late"
    assert run_rank(words, log=log) == 0, log.read_text()
    assert answers(tmp_path / "run") == answers(demo_run)
    assert parts(tmp_path / "run/dataset") == parts(demo_run / "dataset")
    assert not list((tmp_path / "run/failures").glob("*.json"))


def test_the_survivor_of_a_killed_rank_finishes_alone(
    demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", tmp_path / "run"]
    victim, survivor = (start_rank(words, rank=i, world_size=2, log=log) for i in range(2))
    leases = tmp_path / "run/leases"
    while victim.is_alive() and not any(
        f":{victim.pid}" in path.read_text() for path in leases.glob("shard-*.json")
    ):
        time.sleep(0.005)
    victim.kill()
    survivor.join(timeout=120)
    assert survivor.exitcode == 0, log.read_text()
    assert parts(tmp_path / "run/dataset") == parts(demo_run / "dataset")


def test_sigterm_frees_the_lease_at_once(demo_questions: Path, tmp_path: Path) -> None:
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", tmp_path / "run"]
    rank = start_rank(words, log=tmp_path / "log")
    while rank.is_alive() and not list((tmp_path / "run/leases").glob("shard-*.json")):
        time.sleep(0.005)
    rank.terminate()
    rank.join(timeout=60)
    assert rank.exitcode == 143, (tmp_path / "log").read_text()
    assert not list((tmp_path / "run/leases").glob("[!.]*.json"))
