"""A thousand workers on one store: real leases, manifest and results, and a model that sleeps.

Workers are threads of a few processes, "hosts"; every few seconds a host is killed (SIGKILL, with
all workers on it) and another one started in its place. Told are the share of the workers' time
that went into shards, what happened to every shard, and the calls that the store answered. All of
them share this machine's cores, which a cluster's workers do not: what they cost in CPU is told
too, and is taken from their time here.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import Array, c_uint64
from functools import lru_cache
from pathlib import Path
from typing import Any

from stream_engine.config import STAGES, RunConfig, Stage
from stream_engine.ranks import Rank
from stream_engine.records import Failure, PromptDigest, Sample, SampleRollouts
from stream_engine.run_dir import headers, state
from stream_engine.run_dir.manifest import InputInfo, Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import RECORD_TYPES, ResultHeader, read_results
from stream_engine.run_dir.shards import write_shard
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import collect
from stream_engine.store.base import Entry
from stream_engine.work.progress import ProgressView
from stream_engine.work.worker import Worker
from tests.benchmarks.scale.calls import CALLS, count_calls
from tests.benchmarks.scale.measuring import Figures, Keep, memory_of
from tests.echo_pipeline import EchoPipeline, answer
from tests.synthetic import synthetic_sample

FINGERPRINTS: dict[Stage, str] = {"rollouts": "f" * 16, "rewards": "e" * 16}
WATCH_S = 0.2
MEMORY_S = 10.0
"""To add up the pages of twenty large processes takes a good part of a second."""
M_ARENA_MAX = -8  # malloc.h
context = multiprocessing.get_context("fork")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--hosts", type=int, default=20, help="processes that the workers share")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="that a shard takes, on average"
    )
    parser.add_argument("--death_every_s", type=float, default=10.0, help="0: nobody is killed")


def measure(arguments: argparse.Namespace, keep: Keep) -> Figures:
    """One run with deaths, until every worker says that nothing is left."""
    with tempfile.TemporaryDirectory(prefix="workers-", dir=arguments.workdir) as folder:
        config = RunConfig.create(
            {"work_dir": folder, "pipeline_name": "echo", "sample_k": 2, "rank": 1, "device": "cpu"}
        )
        make_shards(RunDir(folder), arguments.shards)
        cluster = Cluster(config, arguments, keep)
        cluster.run()
        return cluster.figures()


def make_shards(run_dir: RunDir, num_shards: int) -> None:
    """Shards of one sample each, without results."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    manifest = Manifest.load(run_dir)
    for index in range(num_shards):
        samples = [synthetic_sample(index, num_images=0)]
        manifest.append_shard(write_shard(run_dir.shard(index), index, samples), source="made")
    counts = {"read": num_shards, "added": num_shards, "known": 0}
    manifest.append_input(InputInfo(source="made", fingerprint="read", settings="", **counts))
    os.fsync = fsync


class SleepPipeline(EchoPipeline):
    """An answer takes the time that is drawn for its sample."""

    seconds = 0.0
    finished: Path

    def rollouts(
        self, engines: Mapping[str, Any], samples: Sequence[Sample], ahead: Iterable[Sample] = ()
    ) -> Iterator[SampleRollouts | Failure]:
        for sample in samples:
            time.sleep(drawn_s(sample.idx, self.seconds))
            with self.finished.open("ab", buffering=0) as log:
                log.write(f"{sample.idx}\n".encode())
            answers = [answer(sample, j) for j in range(self.config.sample_k)]
            prompt = PromptDigest("ids", "pixels", "names")
            yield SampleRollouts(key=sample.key, prompt=prompt, answers=answers)


def drawn_s(idx: str, mean_s: float) -> float:
    """Seconds of a sample: half of the mean, and as much again on average."""
    return mean_s / 2 + random.Random(f"seconds {idx}").expovariate(2 / mean_s)


class Cluster:
    """The hosts, and what they have in common."""

    def __init__(self, config: RunConfig, arguments: argparse.Namespace, keep: Keep) -> None:
        self.config = config
        self.arguments = arguments
        self.keep = keep
        self.run_dir = RunDir(config.work_dir)
        size = len(CALLS) * arguments.workers  # each worker counts for itself, without a lock
        self.counts: Array[c_uint64] = context.Array(c_uint64, size, lock=False)
        self.worker = threading.local()
        self.hosts: dict[int, Any] = {}
        self.begun: dict[int, float] = {}
        self.alive_s = 0.0
        self.num_killed = 0
        self.peak_mib = 0
        SleepPipeline.seconds = arguments.seconds
        SleepPipeline.finished = Path(f"{config.work_dir}-finished.txt")

    def run(self) -> None:
        """Start all, kill one now and then, and wait for the end."""
        rng, arguments = random.Random("deaths"), self.arguments
        self.started, self.started_at = time.monotonic(), time.time()
        for number in range(arguments.hosts):
            self.start(number)
        next_death = time.monotonic() + (arguments.death_every_s or float("inf"))
        next_memory = 0.0
        while self.hosts:
            time.sleep(WATCH_S)
            if time.monotonic() > next_memory:
                held = sum(memory_of(host.pid)[1] for host in self.hosts.values())
                self.peak_mib = max(self.peak_mib, held // 2**20)
                self.keep(self.so_far())
                next_memory = time.monotonic() + MEMORY_S
            for number in [n for n, host in self.hosts.items() if not host.is_alive()]:
                self.leave(number)
            if self.hosts and time.monotonic() > next_death and self.is_work_left():
                number = rng.choice(list(self.hosts))
                os.kill(self.hosts[number].pid, signal.SIGKILL)
                self.num_killed += 1
                self.leave(number)
                self.start(number)
                next_death = time.monotonic() + arguments.death_every_s

    def is_work_left(self) -> bool:
        """Whether a shard was not answered yet: nobody is killed who only waits for the others."""
        return len(self.finished()) < self.arguments.shards

    def finished(self) -> Counter[str]:
        """How often each shard was answered to the end."""
        path = SleepPipeline.finished
        return Counter(path.read_text().split() if path.exists() else [])

    def start(self, number: int) -> None:
        self.hosts[number] = context.Process(target=self.host, args=(number,))
        self.hosts[number].start()
        self.begun[number] = time.monotonic()

    def leave(self, number: int) -> None:
        self.hosts.pop(number).join()
        self.alive_s += self.num_threads * (time.monotonic() - self.begun[number])

    @property
    def num_threads(self) -> int:
        return self.arguments.workers // self.arguments.hosts

    def host(self, number: int) -> None:
        """Some workers, each a thread."""
        logging.basicConfig(level=logging.ERROR)
        count_calls(self.add)
        share_memory()
        first = number * self.num_threads
        threads = [
            threading.Thread(target=self.work, args=(first + i,)) for i in range(self.num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def add(self, name: str, number: int) -> None:
        """Count calls of the worker whose thread this is; those of its heartbeats are left out."""
        if (rank := getattr(self.worker, "rank", None)) is not None:
            self.counts[rank * len(CALLS) + CALLS.index(name)] += number

    def work(self, rank: int) -> None:
        self.worker.rank = rank
        size = self.arguments.workers
        place = Rank(rank=rank, world_size=size, local_world_size=size, threads_set=True)
        worker = Worker(
            self.run_dir,
            self.config,
            SleepPipeline(self.config),
            FINGERPRINTS,
            rank=place,
            view=ProgressView(silent=True),
        )
        worker.work(read_input=False)

    def so_far(self) -> Figures:
        """What can be told at any time, without a look at the run."""
        arguments, finished = self.arguments, self.finished()
        wall_s = time.monotonic() - self.started
        running_s = sum(time.monotonic() - self.begun[number] for number in self.hosts)
        alive_s = self.alive_s + self.num_threads * running_s
        useful_s = sum(drawn_s(idx, arguments.seconds) for idx in finished)
        counts = {name: sum(self.counts[i :: len(CALLS)]) for i, name in enumerate(CALLS)}
        return {
            "workers": arguments.workers,
            "hosts": arguments.hosts,
            "hosts_killed": self.num_killed,
            "workers_killed": self.num_killed * self.num_threads,
            "hosts_at_work": len(self.hosts),
            "seconds_of_a_shard": arguments.seconds,
            "shards_answered": len(finished),
            "shards_answered_more_than_once_to_the_end": sum(n > 1 for n in finished.values()),
            "last_answer_s": round(self.last_answer_s(), 1),
            "wall_s": round(wall_s, 1),
            "least_wall_s": round(useful_s / arguments.workers, 1),
            "share_of_worker_time_in_shards": round(useful_s / alive_s, 3),
            "peak_mib_of_all": self.peak_mib,
            "calls": counts,
            "calls_a_second": {name: round(n / wall_s, 1) for name, n in counts.items()},
            "calls_a_shard": {name: round(n / arguments.shards, 1) for name, n in counts.items()},
        }

    def last_answer_s(self) -> float:
        """Seconds from the start to the answer that was finished last."""
        path = SleepPipeline.finished
        return path.stat().st_mtime - self.started_at if path.exists() else 0.0

    def figures(self) -> Figures:
        """What came of it."""
        found = self.so_far()
        SleepPipeline.finished.unlink()
        status = collect(RunState(self.run_dir, FINGERPRINTS, max_shard_retries=2).refresh())
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        keys = [key for stage in STAGES for key in result_keys(self.run_dir, stage)]
        return found | {
            "shards": {"total": status.shards.total, "done": status.shards.done},
            "samples_lost": self.arguments.shards - status.samples.done,
            "samples_twice_in_results": len(keys) - len(set(keys)),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        }


def share_memory() -> None:
    """Keep what a host's workers read alike once: the memory of one worker, not of fifty.

    Each of them reads the files all the same. Nor do fifty threads that wait for the interpreter
    wake two hundred times a second, each, to ask for it: that took most of the cores.
    """
    sys.setswitchinterval(1.0)
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # or each thread has a heap, half of it empty
    headers.decoded = lru_cache(4)(headers.decoded)
    read, known = state.read_header, {}
    add, shards = Manifest._add, {}

    def read_header(entry: Entry) -> ResultHeader:
        header = read(entry)
        return known.setdefault((entry.path, entry.version), header)

    def add_shared(self: Manifest, line: bytes) -> bool:
        is_whole = add(self, line)
        if self.slim:
            self.slim[-1] = shards.setdefault(self.slim[-1].index, self.slim[-1])
        return is_whole

    state.read_header, Manifest._add = read_header, add_shared


def result_keys(run_dir: RunDir, stage: Stage) -> Iterator[str]:
    """The stage and key of every record of a stage."""
    for path in sorted(Path(str(run_dir.results_dir(stage))).glob("*.msgpack")):
        yield from (f"{stage} {one.key}" for one in read_results(path, RECORD_TYPES[stage]))
