"""Answers and judges by a real server: vLLM with the demo's checkpoints.

Run where VLLM names its program, or `vllm` is found: its CPU build suffices. An own environment is
best, since it brings a torch of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stream_engine.demo import checkpoint_path
from stream_engine.demo.data import write_dataset
from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.run_dir.paths import RunDir
from tests.processes import run_rank, start_rank
from tests.remote.served_checkpoints import write_instruct
from tests.remote.test_server_models import KEY, bytes_with, results

VLLM = os.environ.get("VLLM") or shutil.which("vllm")
START_S = 400.0
NUM_QUESTIONS = 24
MAX_LEN = 1024

pytestmark = [
    pytest.mark.skipif(VLLM is None, reason="no vLLM here: VLLM=/path/to/bin/vllm runs this"),
    pytest.mark.timeout(1200),
]

Serve = Callable[[Path, str], str]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a server of a checkpoint; returns what a setting names its model by."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(checkpoint: Path, name: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("vllm") / "log"
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": KEY}
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OPENAI_API_KEY")}
        words = f"--served-model-name {name} --host 127.0.0.1 --port {port} --dtype float32"
        words += f" --max-model-len {MAX_LEN} --enforce-eager"
        # Its CPU build dies of a seeded request whose prompt it takes in two parts.
        words += " --no-enable-chunked-prefill --max-num-batched-tokens 32768"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(VLLM), "serve", str(checkpoint), *words.split()],
                stdout=out,
                stderr=out,
                cwd=log.parent,
                env=kept | own,
                start_new_session=True,
            )
        processes.append(process)
        wait_for(port, process, log)
        return f"openai:http://127.0.0.1:{port}/v1#{name}"

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def sampler(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> str:
    return serve(write_instruct(tmp_path_factory.mktemp("served") / "llava"), "llava")


@pytest.fixture
def words(tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    questions = write_dataset(tmp_path / "questions.parquet", NUM_QUESTIONS, 3)
    return [
        *("run", "--sampler", sampler, "--dataset_path", questions, "--work_dir", tmp_path / "run"),
        *("--sample_k", 4, "--rank", 1, "--max_new_tokens", 48, "--samples_per_shard", 4),
        *("--report", "never", "--lease_timeout_s", 5),
    ]


def test_a_killed_run_is_resumed_and_each_question_answered_once(
    tmp_path: Path, words: list[Any]
) -> None:
    """With the log-probs of the instruct model, and rewards by the demo's reward model."""
    models = ("--instruct_model_path", checkpoint_path("instruct"))
    models += ("--reward_model_path", checkpoint_path("reward"))
    done = Path(RunDir(str(tmp_path / "run")).results_dir("rollouts"))
    first = start_rank([*words, *models], log=tmp_path / "log")
    ends = time.monotonic() + START_S
    while (
        time.monotonic() < ends and first.is_alive() and not (done.exists() and any(done.iterdir()))
    ):
        time.sleep(0.05)
    assert first.is_alive(), (tmp_path / "log").read_text()[-3000:]
    first.kill()
    first.join()
    num_kept = len(list(done.iterdir()))
    assert 0 < num_kept < NUM_QUESTIONS // 4
    assert run_rank([*words, *models], log=tmp_path / "log") == 0
    found = results(tmp_path / "run", "rollouts", SampleRollouts)
    assert len({record.key for record in found}) == len(found) == NUM_QUESTIONS
    for record in found:
        assert [answer.index for answer in record.answers] == [0, 1, 2, 3]
        for answer in record.answers:
            assert answer.model == "llava"
            assert len(answer.token_logps) == len(answer.token_ids)
    texts = [answer.text for record in found for answer in record.answers]
    assert sum("there is" in text.lower() or "the " in text.lower() for text in texts) > 60, texts
    assert len(results(tmp_path / "run", "rewards", SampleRewards)) == NUM_QUESTIONS
    assert bytes_with(tmp_path, KEY) == []


def test_a_server_splits_answers_and_asks_questions(
    tmp_path: Path, words: list[Any], serve: Serve
) -> None:
    """The judges' text models and the sampler are servers'; the pictures are checked here."""
    text = serve(checkpoint_path("text"), "text")
    judges = f"{checkpoint_path('judge')},{text},{text}"
    more = ("--pipeline_name", "divide_and_conquer", "--reward_model_path", judges)
    assert run_rank([*words, *more, "--format", "trl"], log=tmp_path / "log") == 0
    found = results(tmp_path / "run", "rewards", SampleRewards)
    judged = [record for record in found if record.scores]
    assert len(found) == NUM_QUESTIONS
    assert len(judged) > NUM_QUESTIONS // 2
    assert all(score.scores["facts"] > 0 for record in judged for score in record.scores)
