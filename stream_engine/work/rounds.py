"""Rounds: the next one begun, and the shards of earlier ones that were put back done again.

A shard is answered by the models of its own round, whoever asks and whenever. So a retry in an
earlier round needs these models as they were, and nothing of a finished round needs any.
"""

from __future__ import annotations

from collections.abc import Sequence

from stream_engine.config import STAGES, RunConfig, Stage
from stream_engine.errors import CheckpointError, ConfigError
from stream_engine.models.hub import with_checkpoints
from stream_engine.pipelines import pipeline_class
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import Rank
from stream_engine.run_dir.damage import open_state
from stream_engine.run_dir.next_round import next_round
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import config_of_round
from stream_engine.run_dir.run_json import RunFile, changed_inputs
from stream_engine.run_dir.state import RunState
from stream_engine.work.stage_inputs import stage_inputs


def begin_round(config: RunConfig, number: int | None = None) -> int:
    """Begin the next round of an existing run under these settings, or find it begun; returns its
    number. Any number of workers may ask for it at once.

    Args:
        number: of the round; None: the one at hand where that has these models, else the next.

    Raises:
        ConfigError: when the round at hand is not finished, or is not the one before `number`.
    """
    run_dir = RunDir(config.work_dir)
    pipeline = pipeline_class(config.pipeline_name)(with_checkpoints(config))
    return next_round(
        open_state(run_dir.root),
        config,
        stage_inputs(pipeline),
        number=number,
        worker=Rank.from_environment().worker_id,
    )


def rounds_left(state: RunState, stages: Sequence[Stage]) -> list[int]:
    """The numbers of the rounds that are over and have something left to do at these stages."""
    fingerprints = state.fingerprints
    numbers = {fingerprints.round_of(index) for index in state.unsettled(stages)}
    return sorted(numbers - {fingerprints.at_hand})


def pipeline_of_round(run_file: RunFile, number: int, config: RunConfig) -> Pipeline:
    """The pipeline of a round that is over, as its results were made.

    Raises:
        ConfigError: when a model is no longer what it was.
    """
    theirs = config_of_round(run_file.rounds, number, config)
    pipeline = pipeline_class(theirs.pipeline_name)(with_checkpoints(theirs))
    left = f"shards of round {number} are left to do with its own models"
    try:
        inputs = stage_inputs(pipeline)
    except CheckpointError as error:
        raise ConfigError(f"{left}, but: {error}") from error
    one = run_file.rounds[number - 1]
    changes = changed_inputs(one.stages, inputs)
    if any(one.stages[stage].fingerprint != inputs[stage].fingerprint for stage in STAGES):
        raise ConfigError(f"{left}, but these have changed ({', '.join(changes)}): put them back")
    return pipeline
