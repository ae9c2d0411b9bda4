"""The last step of a run: exactly one worker merges, when every shard is settled."""

from __future__ import annotations

import logging
import time

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.merger import merge, merge_is_current
from stream_engine.pipelines.base import STAGES, Pipeline
from stream_engine.ranks import Rank
from stream_engine.run_state import RunState
from stream_engine.storage.leases import Lease

logger = logging.getLogger(__name__)

POLL_S = 0.2


def merge_when_due(state: RunState, config: RunConfig, pipeline: Pipeline, rank: Rank) -> bool:
    """Merge unless the dataset is up to date; waits while another worker is at it.

    All shards must be settled; failed ones are left out. Returns whether this worker merged.

    Raises:
        ConfigError: when the input held no sample, and no bad record says why.
    """
    state.refresh()
    if not any(state.is_complete(STAGES[-1], shard) for shard in state.shards):
        if not state.shards and not state.num_rejected():
            raise ConfigError("the input holds no samples")
        return False
    lease = wait_for_lease(state, config, rank)
    with lease:
        state.refresh()
        fingerprints = state.fingerprints
        if merge_is_current(state.run_dir, config, pipeline, fingerprints):
            return False
        logger.info("building pairs from %d shards", len(state.shards))
        started = time.monotonic()
        has_failed = any(state.is_failed(shard) for shard in state.shards)
        report = merge(state.run_dir, config, pipeline, fingerprints, allow_partial=has_failed)
        logger.info(
            "merged in %.1f s: %d pairs of %d candidates",
            time.monotonic() - started,
            report.written,
            report.candidates,
        )
    return True


def wait_for_lease(state: RunState, config: RunConfig, rank: Rank) -> Lease:
    """The merge lease; whoever has to wait for it finds the work done."""
    while True:
        lease = Lease.acquire(
            state.run_dir, "merge", worker_id=rank.worker_id, timeout_s=config.lease_timeout_s
        )
        if lease is not None:
            return lease
        time.sleep(POLL_S)
