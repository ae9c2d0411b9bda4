"""kill -9 at any moment costs at most the shards in flight; the same command goes on."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from stream_engine.store.leases import list_leases
from tests.conftest import DEMO_FLAGS, answers, parts
from tests.processes import run_rank, start_rank

NUM_KILLS = 12
"""Of ranks that were alive: a rank that had ended already is not counted."""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_again_and_again_gives_the_undisturbed_dataset(
    seed: int, demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """Two ranks; both are killed at random moments, and started again.

    How long a rank takes depends on the machine: one that ended before its moment makes the next
    moments earlier, and a run that came to its end is compared and begun anew.
    """
    rng = random.Random(seed)
    log = tmp_path / "log"
    latest_s = 1.2
    num_killed = num_finished = 0
    while num_killed < NUM_KILLS:
        work_dir = tmp_path / f"run-{num_finished}"
        words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", work_dir]
        ranks = [start_rank(words, rank=i, world_size=2, log=log) for i in range(2)]
        victims = rng.sample(ranks, 2)
        for rank in victims:
            time.sleep(rng.uniform(0.1, 1.0) * latest_s)
            if rank.is_alive():
                num_killed += 1
            else:
                latest_s = max(0.8 * latest_s, 0.05)
            rank.kill()
        for rank in ranks:
            rank.join()
        assert {rank.exitcode for rank in ranks} <= {0, -signal.SIGKILL}, log.read_text()
        if all(rank.exitcode == 0 for rank in ranks):
            _is_undisturbed(work_dir, demo_run)
            num_finished += 1
    assert run_rank(words, log=log) == 0, log.read_text()
    _is_undisturbed(work_dir, demo_run)


def _is_undisturbed(work_dir: Path, demo_run: Path) -> None:
    assert answers(work_dir) == answers(demo_run)
    assert parts(work_dir / "dataset") == parts(demo_run / "dataset")


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
    assert not list_leases(tmp_path / "run/leases")
