"""Ranks of one team: they do the same, notice when they do not, and never wait for the dead.

Each test plays a scene with two real processes in a gloo world and the echo pipeline; what
happened at each rank is read from a file that it leaves.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, ParallelError
from stream_engine.ranks import Rank
from stream_engine.records import Failure, Sample, SampleRollouts
from stream_engine.run_dir.paths import RunDir
from stream_engine.work import team as team_module
from stream_engine.work.catching import caught
from stream_engine.work.follower import follow
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.team import Team
from tests.echo_pipeline import CALLS, EchoPipeline, echo_config
from tests.processes import context


class OddPipeline(EchoPipeline):
    """Echoes, except that one rank does as "odd ..." questions say."""

    place = 0

    def rollouts(
        self, engines: Any, samples: Sequence[Sample], ahead: Iterable[Sample] = ()
    ) -> Iterator[SampleRollouts | Failure]:
        for outcome, sample in zip(super().rollouts(engines, samples), reversed(samples)):
            what, _, odd_place = sample.question.removeprefix("odd ").rpartition(" ")
            if not sample.question.startswith("odd ") or int(odd_place) != self.place:
                yield outcome
            elif what == "raises":
                raise RuntimeError("only here")
            elif what == "dies":
                os._exit(9)
            elif what == "draws":
                other = msgspec.structs.replace(outcome.answers[0], token_ids=[7])
                yield msgspec.structs.replace(outcome, answers=[other, *outcome.answers[1:]])
            elif what == "sleeps":
                time.sleep(3)
                yield outcome


class Told(msgspec.Struct):
    """What a rank saw."""

    ends: list[str]
    """How each batch of questions ended."""
    calls: dict[str, int]
    error: str
    seconds: float


def lead(team: Team, pipeline: EchoPipeline, batches: Sequence[Sequence[str]]) -> list[str]:
    """Lead a team through batches of questions; "!..." are things that the leader does instead."""
    ends = []
    for batch in batches:
        if batch[0] == "!idle":
            time.sleep(1)
            continue
        if batch[0] == "!raise":
            raise ConfigError("a folder is full")
        samples = [Sample(key=q.replace(" ", ""), idx=q, question=q) for q in batch]
        run = functools.partial(pipeline.rollouts, {}, samples)
        outcomes = team.lead("rollouts", samples, run)
        end = caught(functools.partial(keys, outcomes))
        if isinstance(end, ConfigError | ParallelError):
            raise end
        ends.append(str(end))
    return ends


def keys(outcomes: Iterator[SampleRollouts | Failure]) -> str:
    return " ".join(outcome.key for outcome in outcomes)


def give_up(team: Team, pipeline: EchoPipeline, batches: Sequence[Sequence[str]]) -> list[str]:
    """Take one outcome of a batch, drop the rest, and go on with the next batch."""
    samples = [Sample(key=q, idx=q, question=q) for q in batches[0]]
    outcomes = team.lead("rollouts", samples, functools.partial(pipeline.rollouts, {}, samples))
    next(outcomes)
    outcomes.close()
    return lead(team, pipeline, batches[1:])


def play_rank(place: int, folder: str, batches: Sequence[Sequence[str]], leader: Any) -> None:
    """One rank's process."""
    import torch.distributed as dist

    team_module.BEAT_S = 0.05
    team_module.ALONE_TIMEOUT = timedelta(seconds=1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=place, world_size=2
    )
    rank = Rank(rank=place, local_rank=place, world_size=2, local_world_size=2, tensor_parallel=2)
    pipeline = OddPipeline(echo_config(folder, "none"))
    pipeline.place = place
    started = time.monotonic()

    def take_part() -> list[str]:
        with Team(rank, dist.new_group(backend="gloo", timeout=timedelta(seconds=30))) as team:
            if team.leads:
                return leader(team, pipeline, batches)
            follow(team, pipeline, LoadedEngines(RunDir(folder), pipeline, rank))
            return []

    ends = caught(take_part)
    told = Told(
        ends=ends if isinstance(ends, list) else [],
        calls=dict(CALLS),
        error="" if isinstance(ends, list) else f"{type(ends).__name__}: {ends}",
        seconds=time.monotonic() - started,
    )
    Path(folder, f"{place}.json").write_bytes(msgspec.json.encode(told))
    os._exit(0)


def play(tmp_path: Path, *batches: list[str], leader: Any = lead) -> list[Told | None]:
    """What both ranks told; None of one that died."""
    ranks = [
        context.Process(target=play_rank, args=(place, str(tmp_path), batches, leader))
        for place in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode is not None, "a rank waits for ever"
    files = [tmp_path / f"{place}.json" for place in range(2)]
    return [msgspec.json.decode(f.read_bytes(), type=Told) if f.exists() else None for f in files]


def test_followers_compute_what_the_leader_does(tmp_path: Path) -> None:
    leader, follower = play(tmp_path, ["a cat", "a dog"], ["!idle"], ["a cow"])
    assert leader.ends == ["adog acat", "acow"]
    assert leader.calls == follower.calls
    assert sum(leader.calls.values()) == 3
    assert leader.error == follower.error == ""


def test_an_error_that_all_ranks_share_is_the_leaders_to_handle(tmp_path: Path) -> None:
    leader, follower = play(tmp_path, ["boom now"], ["a cow"])
    assert leader.ends == ["cannot stand 'boom now'", "acow"]
    assert leader.error == follower.error == ""


def test_an_error_of_the_settings_ends_every_rank(tmp_path: Path) -> None:
    leader, follower = play(tmp_path, ["settings of some kind"], ["a cow"])
    assert leader.error == follower.error == "ConfigError: these models do not go together"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        pytest.param("raises 1", "rank 1: RuntimeError: only here", id="follower-raises"),
        pytest.param("raises 0", "rank 0: RuntimeError: only here", id="leader-raises"),
        pytest.param("draws 1", "fell out of step", id="other-tokens"),
    ],
)
def test_ranks_that_end_a_step_differently_stop(tmp_path: Path, what: str, message: str) -> None:
    leader, follower = play(tmp_path, ["a cat", f"odd {what}"], ["a cow"])
    for told in (leader, follower):
        assert told.error.startswith("ParallelError") and message in told.error


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_other_at_once(tmp_path: Path, dead: int) -> None:
    ranks = play(tmp_path, ["a cat", f"odd dies {dead}"], ["a cow"])
    survivor = ranks[1 - dead]
    assert ranks[dead] is None and survivor is not None
    assert survivor.error.startswith("ParallelError")
    assert survivor.seconds < 20


def test_a_rank_that_raised_does_not_wait_for_one_that_hangs(tmp_path: Path) -> None:
    _, follower = play(tmp_path, ["odd sleeps 0", "odd raises 1"])
    assert follower is not None and "only here" in follower.error
    assert "another rank of its worker did not" in follower.error
    assert follower.seconds < 2.5


def test_a_step_given_up_in_the_middle_cannot_be_followed_by_another(tmp_path: Path) -> None:
    leader, _ = play(tmp_path, ["cat", "dog"], ["cow"], leader=give_up)
    assert leader.error.endswith("a step of this worker's ranks was given up in the middle")


def test_followers_end_with_the_leaders_error(tmp_path: Path) -> None:
    leader, follower = play(tmp_path, ["a cat"], ["!raise"])
    assert leader.error == "ConfigError: a folder is full"
    assert follower.error.endswith("the first rank of this worker stopped: a folder is full")


def test_consecutive_ranks_form_a_worker() -> None:
    found = [
        Rank.from_environment({"WORLD_SIZE": "4", "RANK": str(number)}, tensor_parallel=2)
        for number in range(4)
    ]
    assert [(rank.worker, rank.place) for rank in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {rank.num_workers for rank in found} == {2}


@pytest.mark.parametrize("world_size", ["1", "3"])
def test_ranks_that_form_no_workers_are_refused(world_size: str) -> None:
    with pytest.raises(ConfigError, match=r"needs a multiple of 2 ranks.* torchrun or deepspeed"):
        Rank.from_environment({"WORLD_SIZE": world_size}, tensor_parallel=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 2, "offload": "cpu"}, "give one of them"),
        ({"tensor_parallel": 2, "reward_model_python_path": "/usr/bin/python"}, "do not go"),
        ({"offload": "nvme"}, "needs --offload_path"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.create(settings)
