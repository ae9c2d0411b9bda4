"""Workers whose models are on a GPU: signals, a lost context, offloaded weights."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import DEMO_FLAGS, ROOT, answers
from tests.gpu.device import ON_GPU, needs_device

pytestmark = needs_device

LOSES_ITS_DEVICE = """
import sys
import torch
from stream_engine.cli.main import main
from stream_engine.engine.engine import Engine

generate = Engine.generate

def lose(self, *arguments, **more):
    yield next(generate(self, *arguments, **more))
    if self.model.device.type == "cpu":  # where nothing can be lost
        raise RuntimeError("CUDA error: device-side assert triggered")
    table = torch.zeros(3, device=self.model.device)
    print(table[torch.tensor([7], device=self.model.device)])  # asserts in the kernel

Engine.generate = lose
sys.exit(main(sys.argv[1:]))
"""


def words(dataset: Path, work_dir: Path, *more: str) -> list[str]:
    device = "cuda:0" if ON_GPU else "cpu"
    flags = [*DEMO_FLAGS, f"--device={device}", "--dtype=float32", "--look_ahead=never", *more]
    return ["run", *flags, "--dataset_path", str(dataset), "--work_dir", str(work_dir)]


def start(code: list[str], argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *code, *argv],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            # A rehearsal is of the worker here: 24 questions take the interpreter too long.
            env=os.environ | {"OMP_NUM_THREADS": "1", "STREAM_KERNELS_FORM": ""},
        )


def leases(work_dir: Path) -> list[Path]:
    found = (work_dir / "leases").glob("shard-*.json")
    return [path for path in found if path.stat().st_size]


@pytest.fixture(scope="module")
def cpu_run(demo_questions, tmp_path_factory) -> Path:
    """The undisturbed run on CPU. Read only."""
    folder = tmp_path_factory.mktemp("cpu_run")
    finish(demo_questions, folder / "run", folder / "log", "--device=cpu")
    return folder / "run"


def assert_same(one: dict[str, list[list[int]]], other: dict[str, list[list[int]]]) -> None:
    """The same answers; a rounding may change one in fifty."""
    assert one.keys() == other.keys()
    pairs = [pair for key in one for pair in zip(one[key], other[key], strict=True)]
    assert sum(a != b for a, b in pairs) <= len(pairs) // 50


def finish(dataset: Path, work_dir: Path, log: Path, *more: str) -> None:
    process = start(["-m", "stream_engine"], words(dataset, work_dir, *more), log)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]


def test_the_demo_draws_what_it_draws_on_cpu(demo_questions, cpu_run, tmp_path):
    finish(demo_questions, tmp_path / "run", tmp_path / "log")
    assert_same(answers(tmp_path / "run"), answers(cpu_run))


def test_sigterm_while_answers_are_drawn_frees_the_lease(demo_questions, tmp_path):
    work_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(["-m", "stream_engine"], words(demo_questions, work_dir), log)
    while process.poll() is None and not leases(work_dir):
        time.sleep(0.005)
    time.sleep(0.5)  # of the seconds that the first shard takes
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, log.read_text()[-3000:]
    assert not leases(work_dir)


def test_a_lost_context_ends_the_worker_and_gives_its_shard_back(demo_questions, cpu_run, tmp_path):
    work_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(["-c", LOSES_ITS_DEVICE], words(demo_questions, work_dir), log)
    assert process.wait(timeout=300) not in (0, 2), log.read_text()[-3000:]
    assert "same command" in log.read_text(), log.read_text()[-3000:]
    assert not leases(work_dir)
    finish(demo_questions, work_dir, log)
    assert_same(answers(work_dir), answers(cpu_run))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_offloaded_weights_draw_the_same_answers(demo_questions, cpu_run, tmp_path):
    finish(demo_questions, tmp_path / "run", tmp_path / "log", "--offload=cpu", "--max_samples=4")
    drawn, expected = answers(tmp_path / "run"), answers(cpu_run)
    assert len(drawn) == 4
    assert_same(drawn, {key: expected[key] for key in drawn})
