"""Workers of several launchers join and leave while a run goes on: its dataset is the undisturbed
one. Figures are those of `python -m tests.benchmarks.elastic`."""

from __future__ import annotations

import signal
import time
from itertools import cycle
from pathlib import Path

from stream_engine.store.leases import list_leases
from tests.conftest import DEMO_FLAGS, answers, parts
from tests.fleet import Member, join

NUM_DEPARTURES = 2


def test_workers_of_two_launchers_come_and_go(
    demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """Whoever holds a shard leaves, by SIGKILL or SIGTERM in turn, and one of the other kind joins.

    A run that came to its end before is compared, and the next begun.
    """
    kinds, ends = cycle(("torchrun", "python")), cycle((signal.SIGKILL, signal.SIGTERM))
    log = tmp_path / "log"
    num_departed = num_runs = 0
    while num_departed < NUM_DEPARTURES or num_runs == 0:
        work_dir = tmp_path / f"run-{num_runs}"
        words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", work_dir]
        members = [join(next(kinds), words, log=log, environment={}) for _ in range(2)]
        while not any(member.process.poll() == 0 for member in members):
            if num_departed < NUM_DEPARTURES and (holder := holder_of(work_dir, members)):
                holder.leave(next(ends))
                num_departed += 1
                members.append(join(next(kinds), words, log=log, environment={}))
            assert not all(member.has_ended() for member in members), log.read_text()
            time.sleep(0.02)
        for member in members:
            member.process.wait(timeout=120)
        assert answers(work_dir) == answers(demo_run)
        assert parts(work_dir / "dataset") == parts(demo_run / "dataset")
        num_runs += 1


def holder_of(work_dir: Path, members: list[Member]) -> Member | None:
    """The member that is at a shard, if any."""
    leases = [one for one in list_leases(work_dir / "leases") if one.name.startswith("shard")]
    for member in members:
        if not member.has_ended() and member.pids() & {lease.pid for lease in leases}:
            return member
    return None
