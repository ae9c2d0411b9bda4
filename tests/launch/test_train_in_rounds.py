"""launch/train_in_rounds.sh: killed in the middle of a training or a round, it goes on there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stream_engine.demo import checkpoint_path
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.work.runner import state_of
from tests.conftest import DEMO_FLAGS, ROOT, file_states
from tests.launch.holding import at_work, hold
from tests.outputs.test_training import ON_CPU, dataset_of
from tests.outputs.test_trl import save_tiny_llava


def start(tmp_path: Path, demo_questions: Path) -> subprocess.Popen[str]:
    """The script, with a group of its own, for two rounds of six questions."""
    variables = {
        "VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "rounds": "2",
        "questions": "6",
        "nproc_per_node": "1",
        "train": str(ROOT / "tests/launch/nudge.py"),
        "HOLD": str(tmp_path / "hold"),
        "NUDGED": str(tmp_path / "nudged"),
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"work_dir: {tmp_path / 'run'}\ndataset_path: {demo_questions}\n")
    words = [*DEMO_FLAGS, "--config", run_file]
    return subprocess.Popen(
        ["bash", "launch/train_in_rounds.sh", *map(str, words)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("a"),
        text=True,
        start_new_session=True,
    )


def kill_when(script: subprocess.Popen[str], happened: Callable[[], object], log: Path) -> None:
    """SIGKILL to the script and all that it started, at that moment."""
    deadline = time.monotonic() + 240
    while not happened():
        assert script.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(script.pid, signal.SIGKILL)
    script.communicate()


def test_killed_while_it_trains_and_while_it_answers_it_goes_on_where_it_was(
    tmp_path: Path, demo_questions: Path
) -> None:
    run_dir, models, log = RunDir(tmp_path / "run"), tmp_path / "run-models", tmp_path / "log"
    (tmp_path / "hold").touch()
    begun = models / "round-1.partial/begun"
    kill_when(start(tmp_path, demo_questions), begun.exists, log)
    assert not (models / "round-1").exists()
    first = file_states(tmp_path / "run/results")
    (tmp_path / "hold").unlink()

    with hold(run_dir, 2):  # of round 2, whose other shard is answered meanwhile
        second = run_dir.result("rewards", 3)
        kill_when(start(tmp_path, demo_questions), Path(str(second)).exists, log)
    assert (tmp_path / "nudged").read_text() == "round-1.partial instruct True\n"
    before = file_states(tmp_path / "run/results")
    assert {name: before[name] for name in first} == first

    script = start(tmp_path, demo_questions)
    output, _ = script.communicate(timeout=240)
    assert script.returncode == 0, log.read_text()
    assert output.splitlines()[-1] == str(models / "round-2")
    assert (tmp_path / "nudged").read_text().splitlines() == [
        "round-1.partial instruct True",
        "round-2.partial round-1 True",
    ]
    after = file_states(tmp_path / "run/results")
    kept = {name: states for name, states in before.items() if name.endswith(".msgpack")}
    assert {name: after[name] for name in kept} == kept
    run_file = read_run_file(run_dir)
    assert run_file.fingerprints.firsts == [0, 2]
    assert run_file.settings["instruct_model_path"] == str(models / "round-1")
    assert run_file.rounds[0].settings["instruct_model_path"] == str(checkpoint_path("instruct"))
    assert state_of(run_file.config()).unsettled(("rollouts", "rewards")) == {}
    assert not at_work(run_dir)


def test_a_second_one_beside_it_is_refused(tmp_path: Path, demo_questions: Path) -> None:
    models = tmp_path / "run-models"
    models.mkdir()
    with subprocess.Popen(["flock", str(models / "lock"), "cat"], stdin=subprocess.PIPE) as other:
        probe = ["flock", "--nonblock", str(models / "lock"), "true"]
        while subprocess.run(probe).returncode == 0:
            time.sleep(0.02)
        script = start(tmp_path, demo_questions)
        script.communicate(timeout=60)
        assert other.stdin is not None
        other.stdin.close()
    assert script.returncode == 1
    assert "another is at work" in (tmp_path / "log").read_text()


def test_the_example_trains_by_trl_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    """With transformers 5 it went on from the weights of the start: marks in checkpoints tell."""
    pytest.importorskip("trl")
    out, log = tmp_path / "out", tmp_path / "log"
    save_tiny_llava(tmp_path / "model")
    words = [
        dataset_of("trl", tmp_path),
        tmp_path / "model",
        out,
        "--max_steps=4",
        "--save_steps=1",
    ]
    command = [sys.executable, "launch/train_dpo.py", *map(str, words)]
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        training = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    first = out / "checkpoints/checkpoint-1/trainer_state.json"
    kill_when(training, first.exists, log)
    (out / "checkpoints/checkpoint-9").mkdir()  # as a kill leaves one that was being written
    before = weight_of(tmp_path / "model")
    for state in out.glob("checkpoints/*/trainer_state.json"):
        add_one(state.parent)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    going_on = re.search(r"going on from step (\d)", done.stderr)
    assert going_on and int(going_on[1]) >= 1
    assert {"config.json", "model.safetensors", "processor_config.json"} <= set(os.listdir(out))
    assert not (out / "checkpoints").exists()
    assert ((weight_of(out) - before) > 0.5).all(), "it went on from other weights"


WEIGHT = "multi_modal_projector.linear_1.bias"


def weight_of(checkpoint: Path) -> torch.Tensor:
    """A weight that four steps change by far less than one."""
    return load_file(checkpoint / "model.safetensors")[WEIGHT]


def add_one(checkpoint: Path) -> None:
    """Mark a checkpoint, to be known by."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights[WEIGHT] += 1
    save_file(weights, path, metadata={"format": "pt"})
