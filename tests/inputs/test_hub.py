"""Datasets of the hub, from a cache as huggingface_hub lays it out; this machine has no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stream_engine.errors import ConfigError
from stream_engine.inputs.hub import HubSource, parse_hub, split_of
from stream_engine.store.locations import canonical_source
from tests.conftest import ROOT
from tests.samples import make_row, write_jsonl, write_parquet


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds one dataset of two splits."""
    repository = tmp_path / "hub/datasets--someone--pictures"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    folder = repository / "snapshots" / commit
    write_parquet(folder / "data/train-00000-of-00001.parquet", [make_row(1), make_row(2)])
    write_jsonl(folder / "data/test.jsonl", [make_row(3)])
    return tmp_path


def validate(source: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stream_engine", "validate", source],
        env={"HF_HOME": str(cache), "PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
        | environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("source", "num_samples"),
    [
        ("someone/pictures", 3),
        ("someone/pictures:train", 2),
        ("someone/pictures:test", 1),
        ("hf://datasets/someone/pictures", 3),
        ("hf://datasets/someone/pictures/data/test.jsonl", 1),
    ],
)
def test_a_dataset_in_the_cache_is_read_offline(cache: Path, source: str, num_samples: int):
    done = validate(source, cache, HF_HUB_OFFLINE="1")
    assert f"{num_samples} rows: {num_samples} samples, 0 rejected" in done.stdout, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/else", "is no file or folder here, and cannot be fetched"),
        ("someone/pictures:dev", "has no split 'dev'; there is test, train"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(cache: Path, source: str, words: str):
    done = validate(source, cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_path_that_exists_is_no_name_of_the_hub(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert canonical_source("some/data") == "hf://datasets/some/data"
    assert canonical_source("some/data:train") == "hf://datasets/some/data:train"
    (tmp_path / "some/data").mkdir(parents=True)
    assert canonical_source("some/data") == str(tmp_path / "some/data")
    assert canonical_source("data/q.jsonl") == str(tmp_path / "data/q.jsonl")
    assert canonical_source("a/b/c") == str(tmp_path / "a/b/c")
    assert canonical_source("./some") == str(tmp_path / "some")


def test_parts_of_a_name():
    assert parse_hub("hf://datasets/a/b:train") == HubSource("a/b", "train", "")
    assert parse_hub("hf://datasets/a/b/c/d.parquet") == HubSource("a/b", "", "c/d.parquet")
    with pytest.raises(ConfigError, match="owner/name"):
        parse_hub("hf://datasets/a")
    assert [split_of(name) for name in ("RLAIF-V-Dataset_000.parquet", "data/test-0.parquet")] == [
        "train",
        "test",
    ]
