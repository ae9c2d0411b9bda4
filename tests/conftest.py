"""Fixtures that several rooms share: finished demo runs, made once a session."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stream_engine import pipelines
from stream_engine.records import SampleRollouts
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from tests import echo_pipeline
from tests.processes import run_rank

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The echo pipeline among the known ones, with no calls counted."""
    monkeypatch.setitem(pipelines.PIPELINES, "echo", "tests.echo_pipeline:EchoPipeline")
    echo_pipeline.CALLS.clear()
    echo_pipeline.AHEAD.clear()
    yield


def write_questions(path: Path, questions: list[str], *, first_id: int = 0) -> Path:
    """A jsonl dataset of questions about one small picture, with ids in order."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    rows = [
        {"question_id": str(first_id + i), "question": question, "image": picture}
        for i, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stream_engine(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stream_engine", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def file_states(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def parts(dataset: Path) -> dict[str, bytes]:
    """The parquet files of a dataset, by name."""
    return {path.name: path.read_bytes() for path in sorted(dataset.glob("*.parquet"))}


def rows_file(dataset: Path, split: str = "train") -> Path:
    """The one file that holds a dataset's rows: its name ends in their hash."""
    h = "[0-9a-f]" * 8
    patterns = (f"{split}-*-of-*-{h}.parquet", f"{split}-{h}.jsonl", f"{split}-{h}/*.parquet")
    (found,) = (path for pattern in patterns for path in dataset.glob(pattern))
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# A small run of the embedded models: 8 shards of 3 questions, some seconds on one core.
DEMO_FLAGS = ("--demo", "--sample_k=4", "--rank=2", "--max_new_tokens=24", "--samples_per_shard=3")


@pytest.fixture(scope="session")
def demo_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions of the drawn world."""
    from stream_engine.demo.data import write_dataset  # imports pyarrow

    path = tmp_path_factory.mktemp("demo") / "questions.parquet"
    return write_dataset(path, count=24, seed=5)


@pytest.fixture(scope="session")
def demo_run(demo_questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run over `demo_questions` by one plain process. Read only."""
    folder = tmp_path_factory.mktemp("demo_run")
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", folder / "run"]
    assert run_rank(words, log=folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


def answers(work_dir: Path) -> dict[str, list[list[int]]]:
    """The token ids of every answer, by the sample's key."""
    found = {}
    for path in sorted((work_dir / "results/rollouts").glob("*.msgpack")):
        for record in read_results(path, SampleRollouts):
            found[record.key] = [answer.token_ids for answer in record.answers]
    return found
