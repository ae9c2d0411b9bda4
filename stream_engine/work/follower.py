"""The loop of a follower: a rank that loads and computes what its team's leader announces."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from stream_engine.errors import ParallelError, RoundOverError
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import Sample, SampleRollouts
from stream_engine.work.catching import UNMENDABLE, caught
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.team import Compute, End, Load, Outcome, Team

if TYPE_CHECKING:
    from stream_engine.engine import Engine

_decode_samples = msgspec.msgpack.Decoder(list[Sample]).decode
_decode_rollouts = msgspec.msgpack.Decoder(list[tuple[Sample, SampleRollouts]]).decode


def follow(team: Team, pipeline: Pipeline, engines: LoadedEngines) -> None:
    """Do beside the leader what it announces, until it ends the team.

    Raises:
        RoundOverError: when others of this run went on to the next round.
        ParallelError: when the team ends by an error, or falls out of step.
    """
    loaded: Mapping[str, Engine] = {}
    while not isinstance(message := team.receive(), End):
        if isinstance(message, Load):
            result = caught(functools.partial(load, team, message, engines))
            loaded = loaded if isinstance(result, Exception) else result
            error: object = result
        else:
            error = caught(functools.partial(compute, team, message, pipeline, loaded))
        if isinstance(error, UNMENDABLE):
            raise error
    if message.is_round_over:
        raise RoundOverError(message.error)
    if message.error:
        raise ParallelError(f"the first rank of this worker stopped: {message.error}")


def load(team: Team, message: Load, engines: LoadedEngines) -> Mapping[str, Engine]:
    """Load the engines that the leader loads."""
    engines.one_at_a_time = message.one_at_a_time
    return team.loaded(functools.partial(engines.get, message.needed, keep=message.keep))


def compute(
    team: Team, message: Compute, pipeline: Pipeline, engines: Mapping[str, Engine]
) -> None:
    """Run the stage that the leader runs, on the inputs that it sent."""
    if message.stage == "rollouts":
        samples = _decode_samples(message.inputs)
        steps: Iterator[Outcome] = team.in_step(
            functools.partial(pipeline.rollouts, engines, samples)
        )
    else:
        scored = _decode_rollouts(message.inputs)
        steps = team.in_step(functools.partial(pipeline.rewards, engines, scored))
    for _ in steps:
        pass
