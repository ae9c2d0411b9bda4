"""Looking at a run of many shards: commands as processes, and what a worker asks of the disk.

Commands are run in turn, round after round: CPU and wall seconds, the interpreter's start included.
Of a worker: its first look at a finished run, with and without the headers kept by others, and a
look while it works beside others that each hold a lease. It spends a twentieth of its time on
looking at most, which bounds the calls of all workers together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from stream_engine.config import STAGES, RunConfig
from stream_engine.demo import checkpoint_path
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import StageInputs
from stream_engine.run_dir.run_json import open_run
from stream_engine.run_dir.state import RunState, shard_lease
from stream_engine.run_dir.status import collect
from stream_engine.store.leases import Lease
from tests.benchmarks.scale.calls import count_calls
from tests.benchmarks.scale.measuring import ROOT, Figures, Keep
from tests.synthetic import FINGERPRINTS, synthetic_sample, write_run

SHARE = 20
"""A worker looks again after so many times what a look takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)


def measure(arguments: argparse.Namespace, keep: Keep) -> Figures:
    """Of one run that is finished."""
    os.fsync = lambda descriptor: None  # of building the run, not of what is measured
    with tempfile.TemporaryDirectory(prefix="look-", dir=arguments.workdir) as folder:
        run_dir = RunDir(Path(folder) / "run")
        samples = (synthetic_sample(i, num_images=0) for i in range(arguments.shards))
        write_run(run_dir, samples, samples_per_shard=1, sample_k=2)
        inputs = {s: StageInputs(fingerprint=FINGERPRINTS[s], inputs={}) for s in STAGES}
        open_run(run_dir, RunConfig(work_dir=str(run_dir.root)), inputs)
        figures: Figures = {"shards": arguments.shards, "workers": arguments.workers}
        figures["commands"] = commands(run_dir, arguments.rounds)
        keep(figures)
        figures["worker"] = worker(run_dir, arguments.workers)
        figures["commands_with_kept_headers"] = commands(run_dir, arguments.rounds)
        return figures


def commands(run_dir: RunDir, rounds: int) -> Figures:
    """Medians of interleaved rounds."""
    root = str(run_dir.root)
    models = [
        flag
        for role in ("instruct", "reward")
        for flag in (f"--{role}_model_path", str(checkpoint_path(role)))
    ]
    asked = {
        "--help": ["--help"],
        "status": ["status", root],
        "inspect": ["inspect", "12", root],
        "plan": ["plan", "--work_dir", root, "--device", "cpu", *models],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, words in asked.items():
            before, started = os.times(), time.monotonic()
            done = [sys.executable, "-m", "stream_engine", *words]
            subprocess.run(done, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            after = os.times()
            used = after.children_user - before.children_user
            used += after.children_system - before.children_system
            times[name].append((time.monotonic() - started, used))
    return {
        name: {
            "wall_s": round(statistics.median(wall for wall, _ in found), 3),
            "least_wall_s": round(min(wall for wall, _ in found), 3),
            "cpu_s": round(statistics.median(cpu for _, cpu in found), 3),
        }
        for name, found in times.items()
    }


def worker(run_dir: RunDir, num_workers: int) -> Figures:
    """Calls and CPU seconds of a worker's looks."""
    counts: Counter[str] = Counter()

    def look(state: RunState, **how: float) -> Figures:
        counts.clear()
        started, cpu = time.monotonic(), time.process_time()
        state.refresh(**how)
        seconds = time.monotonic() - started
        return {
            "calls": dict(counts),
            "wall_s": round(seconds, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
        }

    def new_state() -> RunState:
        return RunState(run_dir, FINGERPRINTS, max_shard_retries=2, keeps_headers=True)

    count_calls(lambda name, number: counts.update({name: number}))
    figures = {"first_look_of_the_first": look(new_state())}
    figures["first_look"] = look(state := new_state())
    assert collect(state).shards.done == len(state.shards)
    leases = [
        Lease.acquire(run_dir.leases_dir, shard_lease(i), worker_id=f"w{i}", timeout_s=60)
        for i in range(num_workers)
    ]
    time.sleep(1.2 * SHARE * figures["first_look"]["wall_s"])
    figures["look_while_working"] = look(state, max_age_s=1e-9)
    figures["look_before_it_ends"] = look(state)
    for lease in leases:
        assert lease is not None
        lease.release()
    while_working = figures["look_while_working"]
    every_s = max(1.0, SHARE * while_working["wall_s"])
    asked = sum(while_working["calls"].values())
    figures["bound"] = {
        "looks_every_s": round(every_s, 2),
        "calls_a_second_of_all_workers": round(num_workers * asked / every_s, 1),
    }
    return figures
