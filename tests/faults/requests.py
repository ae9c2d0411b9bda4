"""A walk over faults of an object store: python -m tests.faults.requests [--minutes 5] [--seed 0]

Each trial is one command of a run on `s3://` (run, append, merge, retry-failed) through a proxy
that kills it before or after one of its requests, or loses, fails or repeats some of them. Then the
same command is run again undisturbed, and the rows of the dataset must be those of a run on a disk.
Prints a JSON object: by fault, how many trials, and what was bad, with the seeds of those.

The server is moto's, in a process of its own; see tests/s3.py for what it does not check.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import write_questions
from tests.processes import ForkServerProcess, start_rank
from tests.s3 import Fault, FaultyProxy, environment, objects, s3_server

FLAGS = ["--pipeline_name", "echo", "--samples_per_shard", "2", "--sample_k", "6", "--rank", "2"]
QUESTIONS = [f"what is number {i} for" for i in range(6)]
MORE = [f"what else is number {i} for" for i in range(2)]
KINDS = ("kill before", "kill after", "lost", "fail", "repeat", "some of all")
COMMANDS = ("run", "append", "merge", "retry-failed")
HANG_S = 120.0
Rows = dict[str, bytes]


class Trial:
    """One command, one fault, on a run of its own."""

    def __init__(self, server: str, folder: Path, seed: int) -> None:
        self.server = server
        self.folder = folder
        self.rng = random.Random(seed)
        self.kind = self.rng.choice(KINDS)
        self.command = self.rng.choice(COMMANDS)
        self.work_dir = f"s3://bucket/trial-{seed}"
        self.log = folder / "log"
        self.problems: list[str] = []

    def words(self, command: str) -> list[str]:
        first, second = (str(self.folder / name) for name in ("first.jsonl", "second.jsonl"))
        return {
            "run": ["run", *FLAGS, "--dataset_path", first, "--work_dir", self.work_dir],
            "append": ["append", self.work_dir, "--dataset_path", second],
            "merge": ["merge", self.work_dir, "--rank", "1"],
            "retry-failed": ["retry-failed", self.work_dir],
        }[command]

    def start(self, command: str, address: str) -> ForkServerProcess:
        return start_rank(self.words(command), log=self.log, **environment(address))

    def finish(self, command: str) -> None:
        """Run a command undisturbed."""
        process = self.start(command, self.server)
        process.join(timeout=HANG_S)
        if process.exitcode != 0:
            self.problems.append(f"{command} ended with {process.exitcode}")
            process.kill()

    def disturb(self) -> None:
        """Run the command of this trial, with its fault."""
        fatal, share = self.rng.randint(1, 25), 0.3 if self.kind == "some of all" else 0.0
        victim: ForkServerProcess | None = None

        def decide(number: int, method: str, path: str) -> Fault:
            if number != fatal or victim is None:
                some = number and self.rng.random() < share
                return self.rng.choice(("lost", "fail", "repeat")) if some else ""
            if self.kind.startswith("kill"):
                threading.Timer(0.05 if self.kind == "kill after" else 0, victim.kill).start()
                return "" if self.kind == "kill after" else "fail"
            return self.kind if self.kind in ("lost", "fail", "repeat") else ""  # type: ignore[return-value]

        with FaultyProxy(self.server, lambda *_: "") as proxy:
            victim = self.start(self.command, proxy.address)
            proxy.decide = decide
            victim.join(timeout=HANG_S)
            if victim.exitcode is None:
                self.problems.append("hang")
                victim.kill()
            elif victim.exitcode != 0 and not self.kind.startswith("kill"):
                self.problems.append(f"{self.command} ended with {victim.exitcode}")

    def do(self, expected: dict[str, Rows]) -> list[str]:
        """Returns what was bad."""
        if self.command != "run":
            self.finish("run")
        self.disturb()
        self.finish(self.command)
        found = objects(self.server, self.work_dir.removeprefix("s3://bucket/") + "/dataset/")
        rows = {name: data for name, data in found.items() if name.startswith("train-0")}
        if rows != expected[self.command]:
            self.problems.append(f"rows {sorted(rows)}, not {sorted(expected[self.command])}")
        if "Traceback" in self.log.read_text():
            self.problems.append("traceback")
        return self.problems


def expected_rows(folder: Path) -> dict[str, Rows]:
    """The rows that each command leaves on a disk, undisturbed."""
    first, second = (str(folder / name) for name in ("first.jsonl", "second.jsonl"))
    found = {}
    for command, words in (
        ("run", ["run", *FLAGS, "--dataset_path", first, "--work_dir", str(folder / "run")]),
        ("merge", ["merge", str(folder / "run"), "--rank", "1"]),
        ("back", ["merge", str(folder / "run"), "--rank", "2"]),
        ("append", ["append", str(folder / "run"), "--dataset_path", second]),
    ):
        process = start_rank(words, log=folder / "local.log")
        process.join()
        assert process.exitcode == 0, (folder / "local.log").read_text()
        found[command] = {p.name: p.read_bytes() for p in (folder / "run/dataset").glob("train-0*")}
    return found | {"retry-failed": found["run"]}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=1_000_000)
    arguments = parser.parse_args(argv)
    tried: Counter[str] = Counter()
    bad: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as name, s3_server() as server:
        folder = Path(name)
        write_questions(folder / "first.jsonl", QUESTIONS)
        write_questions(folder / "second.jsonl", MORE, first_id=100)
        expected = expected_rows(folder)
        ends = time.monotonic() + 60 * arguments.minutes
        for seed in range(arguments.seed, arguments.seed + arguments.trials):
            if time.monotonic() > ends:
                break
            trial = Trial(server, folder, seed)
            trial.log.unlink(missing_ok=True)
            problems = trial.do(expected)
            tried[f"{trial.kind} / {trial.command}"] += 1
            if problems:
                bad[seed] = [trial.kind, trial.command, *problems]
                print(seed, bad[seed], file=sys.stderr, flush=True)
    print(json.dumps({"trials": tried.total(), "tried": dict(sorted(tried.items())), "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
