"""A dataset is pushed by the real huggingface_hub to a stand-in server that speaks its protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_engine.errors import ConfigError
from stream_engine.outputs.hub import push_folder
from stream_engine.run_dir.paths import RunDir
from tests import hub_server
from tests.conftest import ROOT
from tests.synthetic import run_merge, write_example_run


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.running() as server:
        yield server


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    run_dir: RunDir = write_example_run(tmp_path / "run")
    return Path(run_merge(run_dir, format=("trl",), max_part_bytes=20_000).dataset)


def push(hub: hub_server.Hub, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its environment once."""
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_of_the_stand_in",
        "HF_HOME": str(folder.parent / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
    }
    return subprocess.run(
        [sys.executable, "-m", "stream_engine", "push", str(folder), *words],
        env={k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | own,
        capture_output=True,
        text=True,
        timeout=120,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_repository_holds_what_the_folder_holds(hub: hub_server.Hub, dataset: Path) -> None:
    done = push(hub, dataset, "user/pairs", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("datasets/user/pairs")
    assert hub.repositories["datasets/user/pairs"] == files_of(dataset)
    assert hub.private["datasets/user/pairs"]


def test_an_interrupted_push_goes_on_where_it_stopped(hub: hub_server.Hub, dataset: Path) -> None:
    hub.failing_uploads = 1
    done = push(hub, dataset, "user/pairs")
    assert done.returncode == 1
    assert "goes on where it stopped" in done.stderr
    sent = {name for name in hub.asked if name.startswith("object")}
    assert push(hub, dataset, "user/pairs").returncode == 0
    assert hub.repositories["datasets/user/pairs"] == files_of(dataset)
    assert all(hub.asked[name] == 1 for name in sent), "what had arrived was sent again"


def test_files_of_an_earlier_dataset_go(hub: hub_server.Hub, dataset: Path) -> None:
    hub.repositories["datasets/user/pairs"] = {"train-00000-of-00099.parquet": b"old"}
    done = push(hub, dataset, "user/pairs")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["datasets/user/pairs"] == files_of(dataset)


def test_a_damaged_dataset_and_a_wrong_name_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write user/name"):
        push_folder(dataset, "pairs")
    with pytest.raises(ConfigError, match="holds no dataset"):
        push_folder(tmp_path, "user/pairs")
    part = next(dataset.glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="damaged"):
        push_folder(dataset, "user/pairs")
