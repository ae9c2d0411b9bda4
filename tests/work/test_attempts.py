"""A shard's records one by one: whose fault it was, and when the whole shard is at fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_engine.config import WorkerConfig
from stream_engine.errors import ServerError
from stream_engine.records import Failure, SampleRewards, ShardInfo
from stream_engine.run_dir.failures import (
    MAX_DEATHS_ALONE,
    MAX_DEATHS_TOGETHER,
    ShardFailure,
    read_failure,
    record_failure,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.work.attempts import Isolation
from stream_engine.work.shard_work import ShardWork


class Scoring(ShardWork):
    """The rewards of a shard with the records a, b and bad, which raises; no pipeline is asked."""

    def __init__(self, run_dir: RunDir) -> None:
        names = ["a", "b", "bad"]
        info = ShardInfo(index=0, num_samples=3, num_bytes=1, sha256="", keys=names, ids=names)
        unasked: Any = None
        prints = {"rollouts": "first", "rewards": "second"}
        super().__init__(
            run_dir, unasked, prints, info, lease=unasked, engines={}, tick=lambda *_: None
        )
        self.stage = "rewards"
        self.noted: list[ShardFailure | None] = []

    def outcomes(self, inputs: Mapping[str, Any]) -> Iterator[SampleRewards]:
        self.noted.append(read_failure(self.run_dir, 0))
        if "bad" in inputs:
            raise RuntimeError("no such token")
        yield from (SampleRewards(key=key, scores=[]) for key in inputs)


@pytest.fixture
def work(tmp_path: Path) -> Scoring:
    return Scoring(RunDir(tmp_path))


@pytest.fixture
def failure(work: Scoring) -> ShardFailure:
    return record_failure(
        work.run_dir,
        RuntimeError("no such token"),
        shard=0,
        stage="rewards",
        fingerprint="second",
        worker="w",
        config=WorkerConfig(),
    )


def test_a_server_that_goes_down_between_records_sets_none_aside(
    work: Scoring, failure: ShardFailure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others came through before it did, so that the next one looked like the one at fault."""

    def outcomes(inputs: Mapping[str, Any]) -> Iterator[SampleRewards]:
        if "bad" in inputs:
            raise ServerError("does not answer")
        yield from (SampleRewards(key=key, scores=[]) for key in inputs)

    monkeypatch.setattr(work, "outcomes", outcomes)
    with pytest.raises(ServerError):
        list(Isolation(failure)(work, dict.fromkeys(["a", "b", "bad"])))


def test_a_record_that_survived_one_stage_begins_the_next_without_deaths(
    work: Scoring, failure: ShardFailure
) -> None:
    """And the note of which record is at work names that stage: else a death there is nobody's."""
    deaths = {"": MAX_DEATHS_TOGETHER, "a": MAX_DEATHS_ALONE}
    before = msgspec.structs.replace(failure, stage="rollouts", fingerprint="first", deaths=deaths)
    outcomes = list(Isolation(before)(work, {"a": None, "b": None}))
    assert [type(outcome) for outcome in outcomes] == [SampleRewards] * 2
    assert [(f.stage, f.fingerprint, f.alone) for f in work.noted if f is not None] == [
        ("rewards", "second", "a"),
        ("rewards", "second", "b"),
    ]
    assert work.noted[-1] is not None
    assert work.noted[-1].deaths == {"": MAX_DEATHS_TOGETHER}


def test_when_every_record_raises_the_shard_does(work: Scoring, failure: ShardFailure) -> None:
    with pytest.raises(RuntimeError, match="no such token"):
        list(Isolation(failure)(work, {"bad": None}))


def test_the_last_record_of_a_shard_that_raises_is_set_aside(
    work: Scoring, failure: ShardFailure
) -> None:
    """The others are on file: it is the record that is at fault, and not the whole shard."""
    work.num_kept = 2
    (outcome,) = Isolation(failure)(work, {"bad": None})
    assert isinstance(outcome, Failure)
    assert (outcome.reason, outcome.key, outcome.row) == ("error", "bad", 2)
