"""Begin the next round of a run: from here on new questions are answered under other settings.

One replacement of run.json does it, so that of many processes that are told to the first one does
and the others find it done. A round is left when nothing is left to do in it: every shard is done,
or failed for good (and may be retried later, with that round's models).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import msgspec

from stream_engine.config import STAGES, RunConfig, Stage
from stream_engine.errors import ConfigError, RoundOverError
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.rounds import Round, StageInputs, fingerprints_of
from stream_engine.run_dir.run_json import (
    RunFile,
    change,
    kept_settings,
    read_run_file,
)
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.versions import versions
from stream_engine.store.leases import Lease

OF_ALL_ROUNDS = ("pipeline_name", "pipeline_options", "seed")
"""What ranking goes by, besides settings that may change at any time."""


def next_round(
    state: RunState,
    config: RunConfig,
    stages: Mapping[Stage, StageInputs],
    *,
    number: int | None,
    worker: str,
) -> int:
    """Begin a round, or find that the one at hand is it; returns its number.

    Args:
        stages: what shapes each stage's results under these settings.
        number: of the round; None: the one at hand if it has these very inputs, else the next.

    Raises:
        ConfigError: when the round at hand is not finished, or the number is of another one.
    """
    folder, timeout_s = state.run_dir.leases_dir, config.lease_timeout_s
    # Those of whoever reads and of whoever merges, so that no shard is cut while a round begins,
    # and no merge of the round before finds shards that it does not know.
    wait_for = functools.partial(Lease.wait_for, folder, worker_id=worker, timeout_s=timeout_s)
    with wait_for("ingest"), wait_for("merge"):

        def begun(run_file: RunFile | None) -> RunFile:
            assert run_file is not None, "the run was opened before"
            if is_begun(run_file, stages, number):
                return run_file
            refuse_unfinished(state)
            refuse_other_kind(run_file, config)
            return with_next(state, run_file, kept_settings(config), stages)

        return change(state.run_dir, begun).fingerprints.at_hand


def is_begun(run_file: RunFile, stages: Mapping[Stage, StageInputs], number: int | None) -> bool:
    """Whether the round at hand is the one that is asked for.

    Raises:
        ConfigError: when it is neither that nor the one before it.
    """
    at_hand = run_file.fingerprints.at_hand
    if number is None:
        return fingerprints_of(run_file.stages) == fingerprints_of(stages)
    if number not in (at_hand, at_hand + 1):
        error = RoundOverError if number < at_hand else ConfigError
        raise error(
            f"--round {number}: the run is at round {at_hand}, the next one is {at_hand + 1}"
        )
    return number == at_hand


def refuse_unfinished(state: RunState) -> None:
    """Raise ConfigError when something of the rounds so far is left to do."""
    left = state.refresh().unsettled(STAGES)
    number, num_shards = state.fingerprints.at_hand, len(state.shards)
    is_empty = num_shards == state.fingerprints.first_shard
    if left or is_empty:
        what = f"{len(left)} of its shards are left to do" if left else "it has no questions yet"
        raise ConfigError(
            f"round {number} is not finished: {what}. The command that began it finishes it, or "
            f"`stream-engine run` with its settings"
        )


def refuse_other_kind(run_file: RunFile, config: RunConfig) -> None:
    """Raise ConfigError when pairs of the next round would be chosen in another way."""
    before, now = run_file.config(), config
    for name in OF_ALL_ROUNDS:
        if getattr(before, name) != getattr(now, name):
            raise ConfigError(
                f"{name} is the same in all rounds: {getattr(before, name)!r}, not "
                f"{getattr(now, name)!r}; give another --work_dir"
            )


def with_next(
    state: RunState,
    run_file: RunFile,
    settings: dict[str, Any],
    stages: Mapping[Stage, StageInputs],
) -> RunFile:
    """run.json with the round at hand among those that are over, and the next one begun."""
    over = Round(
        first_shard=run_file.first_shard,
        settings=run_file.settings,
        stages=run_file.stages,
        engines=run_file.engines,
    )
    return msgspec.structs.replace(
        run_file,
        settings=settings,
        stages=dict(stages.items()),
        versions=versions(),
        engines={},
        first_shard=len(Manifest.load(state.run_dir).shards),
        rounds=[*run_file.rounds, over],
    )


def refuse_old_round(state: RunState) -> None:
    """Raise RoundOverError when the run has gone on to another round than `state` knows."""
    now = read_run_file(state.run_dir).fingerprints
    if now.firsts != state.fingerprints.firsts:
        raise RoundOverError(
            f"the run has gone on to round {now.at_hand}; start this command again"
        )
