"""Headers that are kept beside the results: they spare reading, and change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from stream_engine.config import STAGES
from stream_engine.run_dir import headers
from stream_engine.run_dir import state as run_state
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import ResultHeader, read_header
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.status import collect
from stream_engine.store import files
from stream_engine.store.base import Entry, Location
from tests.synthetic import FINGERPRINTS, synthetic_sample, write_run

NUM_SHARDS = 12
OTHER = hashlib.sha256(b"\xc1").digest() + b"\xc1"
"""What another version of the program may have kept: whole, and not to be read."""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A finished run of shards with one sample each; a handful of headers is worth a file."""
    monkeypatch.setattr(run_state, "FEW", 2)
    monkeypatch.setattr(run_state, "MANY", 3)
    made = RunDir(tmp_path / "run")
    write_run(made, map(synthetic_sample, range(NUM_SHARDS)), samples_per_shard=1, sample_k=2)
    return made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The results whose headers are read, as they are."""
    names: list[str] = []

    def read(file: Location | Entry) -> ResultHeader:
        names.append(file.name)
        return read_header(file)

    monkeypatch.setattr(run_state, "read_header", read)
    return names


def look(run_dir: RunDir, *, keeps_headers: bool = False) -> RunState:
    return RunState(
        run_dir, FINGERPRINTS, max_shard_retries=2, keeps_headers=keeps_headers
    ).refresh()


def test_a_run_whose_headers_are_kept_is_seen_without_opening_a_result(
    run_dir: RunDir, opened: list[str]
) -> None:
    whole = collect(look(run_dir, keeps_headers=True))
    assert len(opened) == 2 * NUM_SHARDS
    opened.clear()
    assert collect(look(run_dir)) == whole
    assert whole.shards.done == NUM_SHARDS
    assert opened == []


def test_who_only_looks_writes_nothing(run_dir: RunDir) -> None:
    look(run_dir)
    assert not any(files.exists(run_dir.headers(stage)) for stage in STAGES)


def test_a_result_that_was_replaced_since_is_read(run_dir: RunDir, opened: list[str]) -> None:
    look(run_dir, keeps_headers=True)
    path = run_dir.result("rollouts", 4)
    content, entry = files.read(path) or (b"", None)
    assert entry is not None
    files.replace(path, content[:-1], entry.version)
    opened.clear()
    state = look(run_dir)
    assert opened == ["000004.msgpack"]
    assert not state.is_complete("rollouts", state.shards[4])
    files.remove(path, files.version_of(path) or "")
    assert look(run_dir).header("rollouts", state.shards[4]) is None


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="cut"),
        pytest.param(lambda content: content[:60] + b"\0" + content[61:], id="changed"),
        pytest.param(lambda content: b"x", id="foreign"),
        pytest.param(lambda content: OTHER, id="of-another-program"),
    ],
)
def test_a_damaged_file_is_passed_over_and_written_again(
    run_dir: RunDir, opened: list[str], damage: Callable[[bytes], bytes]
) -> None:
    whole = collect(look(run_dir, keeps_headers=True))
    for stage in STAGES:
        path = run_dir.headers(stage)
        content, entry = files.read(path) or (b"", None)
        assert entry is not None
        files.replace(path, damage(content), entry.version)
    opened.clear()
    assert collect(look(run_dir, keeps_headers=True)) == whole
    assert len(opened) == 2 * NUM_SHARDS
    opened.clear()
    assert collect(look(run_dir)) == whole
    assert opened == []


def test_of_two_workers_who_read_the_same_one_keeps_it(run_dir: RunDir) -> None:
    """The other one has seen the same, and goes on."""
    first = headers.KeptHeaders(run_dir, "rollouts")
    second = headers.KeptHeaders(run_dir, "rollouts")
    entry = files.stat(run_dir.result("rollouts", 0))
    assert entry is not None
    seen = {0: headers.Seen(entry.version, read_header(entry))}
    first.keep(seen)
    second.keep({})
    assert headers.KeptHeaders(run_dir, "rollouts").refresh() == seen
