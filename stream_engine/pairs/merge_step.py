"""The last step of a run: exactly one worker merges, when every shard is settled."""

from __future__ import annotations

import logging
import time
from typing import Literal

from stream_engine.config import STAGES, RunConfig
from stream_engine.errors import ConfigError, LeaseLostError
from stream_engine.outputs.published import CARD
from stream_engine.pairs.merge_inputs import seen_inputs
from stream_engine.pairs.merge_report import MergeReport, is_current
from stream_engine.pairs.merger import merge
from stream_engine.pipelines.base import Pipeline
from stream_engine.run_dir.damage import around_damage
from stream_engine.run_dir.rounds import firsts_on_file
from stream_engine.run_dir.state import RunState
from stream_engine.store import files
from stream_engine.store.base import Version
from stream_engine.store.leases import Lease

logger = logging.getLogger(__name__)

POLL_S = 0.2

Outcome = Literal["merged", "current", "unsettled"]
"""This worker merged; there was nothing to merge; or shards came that are still to be done."""


def merge_when_due(
    state: RunState, config: RunConfig, pipeline: Pipeline, worker: str, *, works: bool
) -> Outcome:
    """`merge_once`, and again when another process has published a dataset meanwhile."""
    while True:
        try:
            return merge_once(state, config, pipeline, worker, works=works)
        except LeaseLostError as error:
            logger.warning("%s", error)
            time.sleep(POLL_S)


def merge_once(
    state: RunState, config: RunConfig, pipeline: Pipeline, worker: str, *, works: bool
) -> Outcome:
    """Merge unless the dataset is up to date; waits while another worker is at it.

    All shards must be settled; failed ones are left out, and so are those of which a file turns
    out to be damaged. An `append` may bring new shards at any moment before this worker has the
    lease. Whoever settles those merges, so they are no error here: a worker (`works`) goes back to
    do them, and a merge alone leaves them to others.

    Raises:
        ConfigError: when the input held no sample, and no bad record says why.
        MissingStageError: without `works`, when shards were unsettled from the outset.
        ChangedError: when another process has published a dataset meanwhile.
    """
    was_settled = not state.refresh().unsettled(STAGES)
    if works and not was_settled:
        return "unsettled"
    if not any(state.is_complete(STAGES[-1], shard) for shard in state.shards):
        if not state.shards and not state.num_rejected():
            raise ConfigError("the input holds no samples")
        return "current"
    before = datasets_on_file(state, config)
    with wait_for_lease(state, config, worker):
        if state.fingerprints.first_of_next(firsts_on_file(state.run_dir)) is not None:
            return "current"  # or no other round could have begun
        is_settled = not state.refresh().unsettled(STAGES)
        if was_settled and not is_settled:
            if not works:
                logger.warning("new shards came; whoever computes them builds the dataset")
            return "unsettled"
        if was_merged_meanwhile(state, config, pipeline, before):
            return "current"
        fingerprints = state.fingerprints
        started = time.monotonic()

        def write() -> MergeReport:
            has_failed = any(state.is_failed(shard) for shard in state.shards)
            allow_partial = has_failed and is_settled
            return merge(state.run_dir, config, pipeline, fingerprints, allow_partial=allow_partial)

        report = around_damage(state, config, worker, write)
        if not report.is_new:
            return "current"
        logger.info(
            "merged in %.1f s: %d pairs of %d candidates",
            time.monotonic() - started,
            report.written,
            report.candidates,
        )
    return "merged"


def was_merged_meanwhile(
    state: RunState, config: RunConfig, pipeline: Pipeline, before: dict[str, Version]
) -> bool:
    """Whether every dataset was replaced since `before`, by one of what this worker has seen.

    The workers of a run all wait for the one that merges. Without this each in turn would read
    every result's header again, under the lease, to find nothing to do.
    """
    now = datasets_on_file(state, config)
    folders = state.run_dir.dataset_folders(config.format)
    if now.keys() != folders.keys() or any(before.get(name) == now[name] for name in now):
        return False
    inputs = seen_inputs(state)
    return all(
        is_current(folder, inputs, inputs.fingerprint(config, pipeline, name))
        for name, folder in folders.items()
    )


def datasets_on_file(state: RunState, config: RunConfig) -> dict[str, Version]:
    """By format, the version of each dataset's card, which a merge puts there last."""
    folders = state.run_dir.dataset_folders(config.format)
    found = {name: files.version_of(folder / CARD) for name, folder in folders.items()}
    return {name: version for name, version in found.items() if version is not None}


def wait_for_lease(state: RunState, config: RunConfig, worker: str) -> Lease:
    """The merge lease; whoever has to wait for it finds the work done."""
    folder, timeout_s = state.run_dir.leases_dir, config.lease_timeout_s
    return Lease.wait_for(folder, "merge", worker_id=worker, timeout_s=timeout_s)
