"""Plain python, torchrun, two torchrun agents and deepspeed: the same keys, the same token ids.

The last two go through the scripts in launch/, as a user would.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stream_engine.demo import checkpoint_path
from stream_engine.run_dir.paths import RunDir
from stream_engine.store.leases import list_leases
from tests.conftest import DEMO_FLAGS, ROOT, answers, parts
from tests.launch.holding import rows_of_round, two_rounds

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "VENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]

Launch = tuple[list[str], dict[str, str]]
"""A command and the variables of its environment."""


def run_data_engine(
    *words: str, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/run_data_engine.sh", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def plain_python(words: Sequence[str]) -> list[Launch]:
    return [([sys.executable, "-m", "stream_engine", *words], {})]


def torchrun(words: Sequence[str]) -> list[Launch]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [([*launcher, "-m", "stream_engine", *words], {})]


def two_torchrun_agents(words: Sequence[str]) -> list[Launch]:
    command = ["bash", "launch/torchrun_multi_node.sh", *words]
    common = {"nnodes": "2", "nproc_per_node": "1", "master_port": free_port()}
    return [(command, common | {"node_rank": str(node)}) for node in range(2)]


def deepspeed(words: Sequence[str]) -> list[Launch]:
    return [(["bash", "launch/deepspeed.sh", *words], {"master_port": free_port()})]


def launched(launches: Sequence[Launch]) -> None:
    """Run these side by side."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, variables in launches
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs


@pytest.mark.parametrize("launcher", [plain_python, torchrun])
def test_every_launcher_gives_the_same_answers(
    launcher: Callable[[Sequence[str]], list[Launch]],
    demo_run: Path,
    demo_questions: Path,
    tmp_path: Path,
) -> None:
    work_dir = tmp_path / "run"
    paths = ["--dataset_path", str(demo_questions), "--work_dir", str(work_dir)]
    launched(launcher(["run", *DEMO_FLAGS, *paths]))
    assert len(answers(demo_run)) == 24
    assert answers(work_dir) == answers(demo_run)
    assert parts(work_dir / "dataset") == parts(demo_run / "dataset")


@pytest.mark.parametrize("launcher", [two_torchrun_agents, deepspeed])
def test_every_launcher_goes_on_with_the_next_round_of_a_run_file(
    launcher: Callable[[Sequence[str]], list[Launch]],
    demo_run: Path,
    demo_questions: Path,
    tmp_path: Path,
) -> None:
    """A second round of three questions; the first has the answers and pairs of a plain run."""
    config = two_rounds(tmp_path, demo_questions)
    launched(launcher([*DEMO_FLAGS, "--config", str(config)]))
    found, dataset = answers(tmp_path / "run"), tmp_path / "run/dataset"
    assert len(found) == 27 and found.items() >= answers(demo_run).items()
    assert rows_of_round(dataset, 1) == rows_of_round(demo_run / "dataset", 1)
    assert rows_of_round(dataset, 2)


def test_the_multi_node_script_starts_a_killed_worker_again(
    demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """One killed worker ended its node's torchrun, and the node's work with it."""
    work_dir = tmp_path / "run"
    paths = ["--dataset_path", str(demo_questions), "--work_dir", str(work_dir)]
    node = subprocess.Popen(
        ["bash", "launch/torchrun_multi_node.sh", *DEMO_FLAGS, *paths],
        cwd=ROOT,
        env=ENVIRONMENT | {"nproc_per_node": "1", "master_port": free_port()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while node.poll() is None and not (leases := list_leases(RunDir(work_dir).leases_dir)):
        time.sleep(0.01)
    os.kill(leases[0].pid, signal.SIGKILL)
    output = node.communicate(timeout=300)[0]
    assert node.returncode == 0, output
    assert parts(work_dir / "dataset") == parts(demo_run / "dataset")


def test_the_data_engine_script_ends_with_the_datasets_path(
    demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """One record is bad: the script still ends with the path, and with status 2. The truth of
    data that are given is not known, though the demo's models answer."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question_id": "b", "question": ""}\n')
    paths = ["--dataset_path", f"{demo_questions},{bad}", "--work_dir", str(tmp_path / "run")]
    done = run_data_engine(*DEMO_FLAGS, *paths)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{tmp_path}/run/dataset"
    assert "pair_accuracy" not in done.stdout
    assert "empty_question" in done.stdout
    assert "Traceback" not in done.stderr
    assert parts(tmp_path / "run/dataset") == parts(demo_run / "dataset")


def test_the_data_engine_script_runs_the_demo_when_nothing_is_given(tmp_path: Path) -> None:
    flags = [*DEMO_FLAGS[1:], "--max_samples=6", "--work_dir", str(tmp_path / "run")]
    done = run_data_engine(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{tmp_path}/run/dataset"
    assert '"pair_accuracy":' in lines[-2]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        pytest.param(
            {"instruct_model_path"}, "dpo_reward needs --reward_model_path", id="no-reward"
        ),
        pytest.param(
            {"reward_model_path"}, "dpo_reward needs --instruct_model_path", id="no-instruct"
        ),
        pytest.param({"dataset_path"}, "dpo_reward needs --instruct_model_path", id="no-models"),
        pytest.param(
            {"instruct_model_path", "reward_model_path"},
            "no input: give --dataset_path",
            id="no-data",
        ),
    ],
)
@pytest.mark.parametrize("way", ["flags", "variables", "file"])
def test_the_data_engine_script_mixes_no_demo_part_into_a_run_of_ones_own(
    way: str, given: set[str], missing: str, demo_questions: Path, tmp_path: Path
) -> None:
    """With only some of models and dataset given, the demo's stood in for the others, and the
    demo's truth was asked about data that it does not know."""
    known = {
        "instruct_model_path": str(checkpoint_path("instruct")),
        "reward_model_path": str(checkpoint_path("reward")),
        "dataset_path": str(demo_questions),
    }
    settings = {name: known[name] for name in given}
    words = [f"--{name}={value}" for name, value in settings.items()] if way == "flags" else []
    if way == "file":
        (tmp_path / "run.yaml").write_text(json.dumps(settings))
        words = ["--config", str(tmp_path / "run.yaml")]
    environment = ENVIRONMENT | (settings if way == "variables" else {})
    done = run_data_engine(*words, "--work_dir", str(tmp_path / "run"), environment=environment)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith(f"stream-engine: {missing}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_data_engine_script_refuses_a_wrong_setting_in_one_line(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"sample_k": "2"}
    done = run_data_engine("--work_dir", str(tmp_path / "run"), environment=environment)
    assert done.returncode == 1
    assert done.stderr == (
        "stream-engine: rank 3 needs at least 6 answers, sample_k is 2; give --rank 1 or "
        "--sample_k 6\n"
    )


def test_the_data_engine_script_works_in_the_folder_that_a_file_names(tmp_path: Path) -> None:
    """It took its own default, and left what the file said unread."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").write_text("mine")
    settings = {"work_dir": str(tmp_path / "run"), "dataset_path": str(tmp_path / "none.parquet")}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    done = run_data_engine("--demo", "--config", str(tmp_path / "run.yaml"))
    assert f"work_dir {tmp_path}/run holds other files (notes)" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_open_with_the_line_that_runs_them(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    lines = script.read_text().splitlines()
    opening = next(line for line in lines if line.startswith("# "))
    assert str(script.relative_to(ROOT)) in opening
