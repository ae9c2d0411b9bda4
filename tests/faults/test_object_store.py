"""A run whose work directory is in an object store has the dataset of one on a disk, come what may.

Against a real S3 server in a process of its own, and a proxy that loses, fails, repeats requests.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stream_engine.run_dir.paths import RunDir
from tests.conftest import write_questions
from tests.processes import ForkServerProcess, start_rank
from tests.s3 import Fault, FaultyProxy, environment, objects, s3_server

QUESTIONS = [f"what is number {i} for" for i in range(12)]
MORE = [f"what else is number {i} for" for i in range(5)]
FLAGS = ["--pipeline_name", "echo", "--samples_per_shard", "3", "--sample_k", "6", "--rank", "2"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


def start(words: Sequence[object], address: str, log: Path, **more: int) -> ForkServerProcess:
    """`stream-engine words` at a server; what it prints is added to `log`."""
    at = environment(address) if address else {}
    return start_rank(words, log=log, **at, **more)


def finish(words: Sequence[object], address: str, log: Path) -> str:
    """The same to its end; returns what it printed."""
    log.unlink(missing_ok=True)
    process = start(words, address, log)
    process.join(timeout=240)
    out = log.read_text()
    assert process.exitcode == 0, out
    assert "Traceback" not in out
    return out


def rows(files: dict[str, bytes]) -> dict[str, bytes]:
    """A dataset's rows, by the name that ends in their hash."""
    return {name: data for name, data in files.items() if name.startswith("train-0")}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, bytes]]]:
    """Two inputs, and the rows of an undisturbed run of the first, and of both, on a disk."""
    folder = tmp_path_factory.mktemp("local")
    first = write_questions(folder / "first.jsonl", QUESTIONS)
    second = write_questions(folder / "second.jsonl", MORE, first_id=100)
    found = []
    run_dir = RunDir(folder / "run")
    for words in (
        ["run", *FLAGS, "--dataset_path", first, "--work_dir", run_dir.root],
        ["append", run_dir.root, "--dataset_path", second],
    ):
        finish(words, "", folder / "log")
        found.append({p.name: p.read_bytes() for p in (folder / "run/dataset").glob("train-0*")})
    return first, second, found


def test_two_workers_a_kill_a_resume_and_an_append_give_the_dataset_of_a_disk(
    server: str, local: tuple[Path, Path, list[dict[str, bytes]]], tmp_path: Path
) -> None:
    first, second, (of_first, of_both) = local
    log = tmp_path / "log"
    words = ["run", *FLAGS, "--dataset_path", first, "--work_dir", "s3://bucket/run"]
    workers = [start(words, server, log, rank=rank, world_size=2) for rank in range(2)]
    while not objects(server, "run/shards/"):
        assert workers[0].is_alive(), log.read_text()
        time.sleep(0.02)
    workers[0].kill()
    for worker in workers:
        worker.join(timeout=240)
    assert workers[1].exitcode == 0, log.read_text()
    assert "nothing to do" in finish(words, server, log)
    assert rows(objects(server, "run/dataset/")) == of_first
    finish(["append", "s3://bucket/run", "--dataset_path", second], server, log)
    assert rows(objects(server, "run/dataset/")) == of_both
    assert "17 = 17 done + 0 quarantined" in finish(["status", "s3://bucket/run"], server, log)
    assert "ok" in finish(["validate", "s3://bucket/run"], server, log)
    assert "put back 0 shards" in finish(["retry-failed", "s3://bucket/run"], server, log)
    assert "answer" in finish(["inspect", "100", "s3://bucket/run"], server, log)


def test_what_failed_in_a_store_is_named_and_tried_again(server: str, tmp_path: Path) -> None:
    questions = ["what is this for", "boom is this", "aside is this", "what is that for"]
    words = ["--dataset_path", write_questions(tmp_path / "q.jsonl", questions)]
    log, work_dir = tmp_path / "log", "s3://bucket/failed"
    flags = [*FLAGS, "--retry_backoff_s", "0.01"]
    process = start(["run", *flags, *words, "--work_dir", work_dir], server, log)
    process.join(timeout=240)
    out = log.read_text()
    assert process.exitcode == 2 and "4 = 2 done + 2 quarantined" in out, out
    assert "s3://bucket/failed/shards/000000.tar" in out and "cannot stand" in out
    process = start(["retry-failed", work_dir], server, log)
    process.join(timeout=240)
    assert "put back 0 shards and 2 records" in log.read_text()
    assert "ok" in finish(["validate", work_dir], server, log)


def test_a_dataset_in_a_store_loads_when_copied_and_by_its_url(
    server: str, local: tuple[Path, Path, list[dict[str, bytes]]], tmp_path: Path
) -> None:
    first, _, (of_first, _) = local
    log, work_dir = tmp_path / "log", "s3://bucket/loaded"
    words = ["run", *FLAGS, "--dataset_path", first, "--work_dir", work_dir]
    finish(words, server, log)
    finish(["export", work_dir, "--format", "trl", "--out", "s3://bucket/out"], server, log)
    for name, data in objects(server, "out/").items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    code = "import sys; from datasets import load_dataset\nprint(len(load_dataset(%s)['train']))"
    by_url = "'parquet', data_files=sys.argv[1] + '/train-*-of-*.parquet'"
    for place, call in ((str(tmp_path / "copy"), "sys.argv[1]"), ("s3://bucket/out", by_url)):
        found = subprocess.run(
            [sys.executable, "-c", code % call, place],
            env={**os.environ, **environment(server), "HF_HOME": str(tmp_path / "hf")},
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        )
        assert int(found.stdout) == 36, place
    assert rows(objects(server, "loaded/dataset/")) == of_first


@pytest.mark.parametrize("seed", [0])
def test_lost_failed_and_repeated_requests_shape_no_dataset(
    server: str, local: tuple[Path, Path, list[dict[str, bytes]]], seed: int, tmp_path: Path
) -> None:
    """One request in four that changes something goes wrong in one of three ways."""
    first, _, (of_first, _) = local
    rng = random.Random(seed)
    faults: list[Fault] = []

    def decide(number: int, method: str, path: str) -> Fault:
        if not number or rng.random() > 0.25:
            return ""
        faults.append(rng.choice(("lost", "fail", "repeat")))
        return faults[-1]

    work_dir, log = f"s3://bucket/faulty-{seed}", tmp_path / "log"
    with FaultyProxy(server, decide) as proxy:
        words = ["run", *FLAGS, "--dataset_path", first, "--work_dir", work_dir]
        finish(words, proxy.address, log)
    assert len(faults) > 3
    assert rows(objects(server, f"faulty-{seed}/dataset/")) == of_first
    assert "12 = 12 done" in finish(["status", work_dir], server, log)
    assert "ok" in finish(["validate", work_dir], server, log)


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_a_kill_at_any_request_costs_nothing(
    server: str,
    local: tuple[Path, Path, list[dict[str, bytes]]],
    is_done: bool,
    tmp_path: Path,
) -> None:
    """Killed again and again, at one of the first requests that change something."""
    first, _, (of_first, _) = local
    work_dir, log = f"s3://bucket/killed-{is_done}", tmp_path / "log"
    words = ["run", *FLAGS, "--dataset_path", first, "--work_dir", work_dir]
    rng, num_kills, status = random.Random(0), 0, -signal.SIGKILL
    while status == -signal.SIGKILL and num_kills < 5:
        fatal = rng.randint(5, 16)
        with FaultyProxy(server, lambda *_: "") as proxy:
            victim = start(words, proxy.address, log)

            def decide(
                number: int,
                method: str,
                path: str,
                victim: ForkServerProcess = victim,
                fatal: int = fatal,
            ) -> Fault:
                if number != fatal:
                    return ""
                threading.Timer(0.05 if is_done else 0.0, victim.kill).start()
                return "" if is_done else "fail"

            proxy.decide = decide
            victim.join(timeout=240)
            status = victim.exitcode
        num_kills += status == -signal.SIGKILL
    assert "Traceback" not in log.read_text()
    finish(words, server, log)
    assert num_kills > 2
    assert rows(objects(server, f"killed-{is_done}/dataset/")) == of_first
    assert "12 = 12 done" in finish(["status", work_dir], server, log)
    assert "ok" in finish(["validate", work_dir], server, log)
