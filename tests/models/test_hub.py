"""Models of the hub, fetched by the real huggingface_hub from a stand-in server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_engine.demo import checkpoint_path
from stream_engine.store.locations import is_hub_model
from tests import hub_server
from tests.conftest import ROOT, write_questions

NAME = "acme/instruct"
CACHED = """
import sys
from stream_engine.models.hub import cached_folder
print(*map(cached_folder, sys.argv[1:]))
"""


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    """It holds the demo's instruct model, with pickled weights and code beside."""
    folder = checkpoint_path("instruct")
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    files |= {"pytorch_model.bin": b"pickle", "modeling_acme.py": b"raise SystemExit"}
    with hub_server.running() as server:
        server.repositories[f"models/{NAME}"] = files
        server.repositories["models/acme/pickled"] = {"config.json": b"{}", "a.bin": b"pickle"}
        yield server


def engine(home: Path, hub: hub_server.Hub, *words: str, **own: str) -> subprocess.Popen[str]:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "stream_engine", *words],
        env={k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | environment | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home.parent,
    )


def plan_words(home: Path, model: str) -> list[str]:
    dataset = write_questions(home.parent / "q.jsonl", ["what is this"])
    reward = str(checkpoint_path("reward"))
    return [
        *("plan", "--instruct_model_path", model, "--reward_model_path", reward),
        *("--dataset_path", str(dataset), "--work_dir", str(home.parent / "w")),
    ]


def test_a_model_is_fetched_once_by_processes_that_start_together(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    words = plan_words(tmp_path / "home", f"{NAME}@main")
    both = [engine(tmp_path / "home", hub, *words) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
        assert "models--acme--instruct" in out
    assert hub.asked["file model.safetensors"] == 1
    assert not hub.asked["file pytorch_model.bin"] and not hub.asked["file modeling_acme.py"]
    found = subprocess.run(
        [sys.executable, "-c", CACHED, NAME, "acme/nothing"],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "models--acme--instruct" in found[0] and found[1] == "acme/nothing"
    offline = engine(tmp_path / "home", hub, *words, HF_HUB_OFFLINE="1")
    assert offline.wait(timeout=200) == 0


def test_a_run_keeps_the_models_id(hub: hub_server.Hub, tmp_path: Path) -> None:
    words = plan_words(tmp_path / "home", NAME)
    process = engine(tmp_path / "home", hub, "shard", *words[1:])
    assert process.communicate(timeout=200)[0] is not None and process.returncode == 0
    settings = json.loads((tmp_path / "w/run.json").read_text())["settings"]
    assert settings["instruct_model_path"] == NAME


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("acme/nothing", "'acme/nothing' is no folder here, and cannot be fetched"),
        ("acme/pickled", "has no weights as safetensors"),
    ],
)
def test_a_model_that_cannot_be_had_is_named(
    hub: hub_server.Hub, tmp_path: Path, model: str, says: str
) -> None:
    process = engine(tmp_path / "home", hub, *plan_words(tmp_path / "home", model))
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1 and says in error, error


def test_what_is_a_folder_here_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_model("acme/vlm-7b@v1.0") and is_hub_model("Qwen/Qwen2.5-VL-7B-Instruct")
    for path in ("/acme/vlm", "./acme/vlm", "acme", "a/b/c", "~/vlm"):
        assert not is_hub_model(path), path
    (tmp_path / "acme/vlm").mkdir(parents=True)
    assert not is_hub_model("acme/vlm")
