"""An ingest that is killed at any write, or at random times, loses and doubles nothing."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest

from stream_engine.inputs.ingest import ingest
from stream_engine.run_dir.paths import RunDir
from stream_engine.store.local import is_temporary
from tests.inputs.ingested import CONFIG, durable, numbers
from tests.samples import make_row, write_jsonl


def ingest_until_step(root: str, sources: list[str], fatal_step: int) -> None:
    """Ingest in a process that kills itself around its n-th write or rename."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function):
        def call(*arguments, **options):
            step()
            result = function(*arguments, **options)
            step()
            return result

        return call

    for name in ("link", "symlink", "rename", "unlink", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    ingest(RunDir(root), sources, CONFIG)


def ingest_whole(root: str, sources: list[str]) -> None:
    ingest(RunDir(root), sources, CONFIG)


@pytest.fixture(scope="module")
def spawn():
    """Fresh processes that have the slow imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["webdataset", "tests.inputs.test_ingest"])

    def start(target, *arguments):
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two inputs with repeated, conflicting and bad rows."""
    bad = [{"idx": 90, "question": ""}, {**make_row(1), "question": "Other?"}, "{broken"]
    first = write_jsonl(tmp_path / "a.jsonl", [*numbers(0, 4), *bad, *numbers(2, 6)])
    second = write_jsonl(tmp_path / "b.jsonl", [*numbers(5, 8), *bad])
    return [str(first), str(second)]


@pytest.fixture
def undisturbed(tmp_path: Path, sources: list[str]) -> dict[str, bytes]:
    ingest(RunDir(tmp_path / "undisturbed"), sources, CONFIG)
    return durable(tmp_path / "undisturbed")


def test_a_kill_at_every_write_changes_nothing(tmp_path: Path, sources, undisturbed, spawn):
    """Shards, manifest (with its counts) and quarantine are byte for byte the same."""
    fatal_step = 0
    exit_code = -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        fatal_step += 1
        root = tmp_path / f"killed-{fatal_step}"
        process = spawn(ingest_until_step, str(root), sources, fatal_step)
        process.join()
        exit_code = process.exitcode
        ingest(RunDir(root), sources, CONFIG)
        assert durable(root) == undisturbed, f"killed at step {fatal_step}"
        assert not any(is_temporary(path) for path in (root / "shards").iterdir())
    assert exit_code == 0
    assert fatal_step > 20


def test_repeated_kills_at_random_times_change_nothing(tmp_path, sources, undisturbed, spawn):
    root = tmp_path / "killed"
    num_killed = 0
    for attempt in range(15):
        process = spawn(ingest_whole, str(root), sources)
        process.join(attempt * random.uniform(0.0, 0.015))
        process.kill()
        process.join()
        num_killed += process.exitcode != 0
    ingest(RunDir(root), sources, CONFIG)
    assert num_killed > 0
    assert durable(root) == undisturbed
    assert not any(is_temporary(path) for path in (root / "shards").iterdir())
