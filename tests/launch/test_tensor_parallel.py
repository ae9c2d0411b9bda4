"""Workers of two ranks each, under both launchers: the answers are those of one process.

And what happens when a rank of a worker is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stream_engine.store.leases import list_leases
from tests.conftest import DEMO_FLAGS, ROOT, answers, rows_file
from tests.launch.holding import two_rounds
from tests.launch.test_launchers import ENVIRONMENT, free_port
from tests.processes import run_rank, start_rank

COLUMNS = ["idx", "question", "chosen", "rejected"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]


def rows(run: Path) -> list[dict[str, Any]]:
    part = rows_file(run / "dataset")
    return pq.read_table(part, columns=COLUMNS).to_pylist()


@pytest.mark.parametrize(
    ("launcher", "variables", "settings"),
    [
        pytest.param([*TORCHRUN, "-m", "stream_engine", "run"], {}, [], id="torchrun-2x2"),
        pytest.param(
            ["bash", "launch/deepspeed.sh"],
            {"num_workers": "2"},
            ["--placement=staged"],
            id="deepspeed-1x2-staged",
        ),
    ],
)
def test_workers_of_two_ranks_build_the_same_pairs(
    launcher: list[str],
    variables: dict[str, str],
    settings: list[str],
    demo_run: Path,
    demo_questions: Path,
    tmp_path: Path,
) -> None:
    """Of both rounds of a run file: for the second the ranks of a worker meet once more."""
    words = [*DEMO_FLAGS, "--tensor_parallel=2", *settings]
    done = subprocess.run(
        [*launcher, *words, "--config", str(two_rounds(tmp_path, demo_questions))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"master_port": free_port()} | variables,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = answers(tmp_path / "run")
    assert len(found) == 27 and found.items() >= answers(demo_run).items()
    assert rows(tmp_path / "run/rounds/1") == rows(demo_run)


@pytest.mark.parametrize(
    ("how", "lost", "status"),
    [
        pytest.param(signal.SIGKILL, [1], 1, id="follower-killed"),
        pytest.param(signal.SIGTERM, [1, 0], 143, id="launcher-ends-all"),
    ],
)
def test_a_lost_rank_ends_its_worker_and_another_run_resumes(
    how: signal.Signals,
    lost: list[int],
    status: int,
    demo_run: Path,
    demo_questions: Path,
    tmp_path: Path,
) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", run]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    split = [*words, "--tensor_parallel=2"]
    ranks = [start_rank(split, rank=i, world_size=2, log=log, **meeting) for i in range(2)]
    while all(rank.is_alive() for rank in ranks) and not list(run.glob("results/*/*.msgpack")):
        time.sleep(0.005)
    for number in lost:
        os.kill(ranks[number].pid or 0, how)
    for rank in ranks:
        rank.join(timeout=60)
    assert ranks[0].exitcode == status, log.read_text()
    assert not list_leases(run / "leases")
    if status == 1:
        assert "stream-engine: " in log.read_text()
    assert run_rank(words, log=log) == 0, log.read_text()
    assert answers(run) == answers(demo_run)
