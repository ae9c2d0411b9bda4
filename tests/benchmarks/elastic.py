"""What it costs that workers come and go: the demo undisturbed, and with members of all launchers.

    python -m tests.benchmarks.elastic [--questions 300] [--every_s 12] [--seed 0] [--out FILE]

Two members, a torchrun of one worker each, do the run undisturbed. Then two members do it again,
of plain python, torchrun and Ray in turn: every `--every_s` seconds one leaves, by SIGKILL or
SIGTERM, and another joins, so that there are always two. Both datasets must be equal, byte by byte.

Prints one JSON object. `lost` is what the disturbed run took more: a started worker imports torch
and loads its models again, and what it had done of a shard is done again. CPU seconds are those of
all workers and launchers, Ray's own daemons left out; where other programs share the machine they
say more than wall seconds do.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import parts
from tests.fleet import Member, join

KINDS = ("python", "torchrun", "ray")
SAMPLE_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class CpuClock:
    """CPU seconds of what this process starts, directly or not, from now on.

    Orphans come back to this process, so that nothing is lost of them.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.before = {process.pid for process in psutil.Process().children(recursive=True)}
        self.seconds: dict[tuple[int, float], float] = {}

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid not in self.before:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self.seconds[process.pid, process.create_time()] = times.user + times.system

    def total(self) -> float:
        return sum(self.seconds.values())


@contextmanager
def ray_cluster() -> Iterator[dict[str, str]]:
    """A cluster with room for two workers; what finds it stands in the environment given."""
    os.environ.update(RAY_ENVIRONMENT)
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")
    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "temp_dir": folder}, shutdown_at_exit=False
    )
    try:
        yield {**RAY_ENVIRONMENT, "RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Leaves:
    """Who leaves, when and how: drawn from a seed, every `every_s` seconds; never without it."""

    def __init__(self, every_s: float | None, seed: int) -> None:
        self.every_s = every_s
        self.draw = random.Random(seed)
        self.last = time.monotonic()
        self.counts: Counter[str] = Counter()

    def when_due(self, members: list[Member]) -> None:
        if self.every_s is None or time.monotonic() - self.last < self.every_s:
            return
        self.last = time.monotonic()
        member = self.draw.choice(members)
        number = self.draw.choice([signal.SIGKILL, signal.SIGTERM])
        self.counts[f"{member.kind} {number.name}"] += 1
        print(f"{member.kind} leaves by {number.name}", file=sys.stderr)
        member.leave(number)


def timed(
    words: list[str], kinds: Iterator[str], leaves: Leaves, *, log: Path, found_by: dict[str, str]
) -> dict[str, Any]:
    """A run with two members at any time, until one of them ends well."""
    clock, started = CpuClock(), time.monotonic()
    members: list[Member] = []
    num_joined = 0
    while not any(member.process.poll() == 0 for member in members):
        leaves.when_due(members)
        members = [member for member in members if not member.has_ended()]
        while len(members) < 2:
            members.append(join(next(kinds), words, log=log, environment=found_by))
            num_joined += 1
        clock.look()
        time.sleep(SAMPLE_S)
    wall_s = time.monotonic() - started
    for member in members:
        member.process.wait(timeout=120)
    clock.look()
    return {"wall_s": round(wall_s, 1), "cpu_s": round(clock.total(), 1), "joined": num_joined}


def measure(questions: int, every_s: float, seed: int) -> dict[str, Any]:
    """Both runs, and what the second took more."""
    from stream_engine.demo.data import write_dataset

    with tempfile.TemporaryDirectory() as name, ray_cluster() as found_by:
        folder = Path(name)
        dataset = write_dataset(folder / "questions.parquet", count=questions, seed=5)
        words = ["run", "--demo", "--samples_per_shard=8", f"--dataset_path={dataset}"]
        words += ["--failures_ok", "--report=never"]
        load = os.getloadavg()[0]

        def run(work_dir: Path, kinds: tuple[str, ...], leaves: Leaves) -> dict[str, Any]:
            line, log = [*words, f"--work_dir={work_dir}"], folder / "log"
            return timed(line, cycle(kinds), leaves, log=log, found_by=found_by)

        alone = run(folder / "undisturbed", ("torchrun",), Leaves(None, seed))
        leaves = Leaves(every_s, seed)
        mixed = run(folder / "disturbed", KINDS, leaves)
        rows = [parts(folder / kind / "dataset") for kind in ("undisturbed", "disturbed")]
        assert rows[0] and rows[0] == rows[1], "the datasets differ"
        lost = {
            unit: {
                "seconds": round(mixed[unit] - alone[unit], 1),
                "share": round(mixed[unit] / alone[unit] - 1, 3),
                "seconds_a_departure": round(
                    (mixed[unit] - alone[unit]) / max(1, leaves.counts.total()), 1
                ),
            }
            for unit in ("wall_s", "cpu_s")
        }
        return {
            "command": f"python -m tests.benchmarks.elastic --questions {questions} "
            f"--every_s {every_s:g} --seed {seed}",
            "cores": len(os.sched_getaffinity(0)),
            "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
            "questions": questions,
            "shards": -(-questions // 8),
            "every_s": every_s,
            "undisturbed": alone,
            "disturbed": {**mixed, "left": dict(sorted(leaves.counts.items()))},
            "lost": {"wall": lost["wall_s"], "cpu": lost["cpu_s"]},
            "datasets_equal": True,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--every_s", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments.questions, arguments.every_s, arguments.seed)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
