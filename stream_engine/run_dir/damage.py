"""Finished files whose bytes have changed: set aside and recorded, so that the rest goes on.

A result can be computed again, so a damaged one is moved out of the way and its shard is failed
until someone asks for a retry. A shard's tar cannot: it is the only copy of its samples here. Its
results stay where they are, but no pairs are built from them while the tar is damaged.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from typing import TypeVar

from stream_engine.config import STAGES, RunConfig, Stage, WorkerConfig
from stream_engine.errors import ShardReadError
from stream_engine.run_dir.failures import record_failure
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.state import RunState, numbered, shard_lease
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.store.leases import Lease

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_state(work_dir: str | Location) -> RunState:
    """The state of an existing run, from its files alone.

    Raises:
        ShardReadError: when its manifest does not list what lies there.
    """
    run_dir = RunDir(work_dir)
    run_file = read_run_file(run_dir)
    retries = run_file.config().max_shard_retries
    state = RunState(run_dir, run_file.fingerprints, max_shard_retries=retries).refresh()
    num_listed = len(state.manifest.shards)
    if state.highest_result >= num_listed or files.exists(run_dir.shard(num_listed + 1)):
        whole_manifest(run_dir)
        state.refresh()
    return state


def around_damage(state: RunState, config: RunConfig, worker: str, write: Callable[[], T]) -> T:
    """What `write` returns, once the shards whose files it finds damaged are failed.

    The caller holds the merge lease; `write` leaves failed shards out, as `state` then knows them.

    Raises:
        ShardReadError: when another worker is at the damaged shard.
    """
    while True:
        try:
            return write()
        except ShardReadError as error:
            note_damage(state, config, worker, error)
            state.refresh()


def note_damage(state: RunState, config: RunConfig, worker: str, error: ShardReadError) -> None:
    """Record the final failure of the shard whose tar or result the error names."""
    run_dir = state.run_dir
    index, stage = shard_and_stage(run_dir, error)
    lease = Lease.acquire(
        run_dir.leases_dir, shard_lease(index), worker_id=worker, timeout_s=config.lease_timeout_s
    )
    if lease is None:
        raise error
    with lease:
        again = f"`stream-engine retry-failed {shlex.quote(str(run_dir.root))}`"
        if stage is None:
            remedy = (
                "a shard's tar cannot be computed again: put back a copy of it, then "
                f"{again}; without a copy its {state.shards[index].num_samples} samples "
                "are lost to this run, so give their input to another --work_dir"
            )
        else:
            kept = set_aside(run_dir, stage, index)
            remedy = f"kept as {kept}; {again} computes it again"
        failure = record_failure(
            run_dir,
            error,
            shard=index,
            stage=stage or STAGES[-1],
            fingerprint=state.fingerprints.of(index)[stage or STAGES[-1]],
            worker=worker,
            config=config.part(WorkerConfig),
            damaged="tar" if stage is None else "result",
            remedy=remedy,
        )
    logger.warning("shard %d is left out: %s", index, failure.error)


def whole_manifest(run_dir: RunDir) -> Manifest:
    """The manifest of a run, which lists all shards and results that lie there.

    Only the last tar need not be listed: that of an ingest that was killed before its line. What is
    listed is read after what lies there, so that workers who add to both are no fault.

    Raises:
        ShardReadError: when others are not.
    """
    tars = [index for index, _ in numbered(run_dir.shards_dir)]
    results = [i for stage in STAGES for i, _ in numbered(run_dir.results_dir(stage))]
    manifest = Manifest.load(run_dir)
    num_listed = len(manifest.shards)
    lost = max([index - 1 for index in tars] + results, default=-1)
    if lost >= num_listed:
        raise ShardReadError(
            run_dir.manifest,
            f"lists {num_listed} shards, but files of shard {lost} are there: it was cut or lost. "
            "Put a copy of it back, or give the inputs to another --work_dir",
        )
    return manifest


def set_aside(run_dir: RunDir, stage: Stage, index: int) -> Location:
    """Move a stage's result away, and those made from it; returns where it is now.

    Rewards are of the very answers that were lost, and another GPU may draw others.
    """
    for later in STAGES[STAGES.index(stage) :]:
        path, kept = run_dir.result(later, index), run_dir.damaged(later, index)
        if (found := files.read(path)) is not None:
            content, entry = found
            files.replace(kept, content, files.version_of(kept))
            files.remove(path, entry.version)
    return run_dir.damaged(stage, index)


def shard_and_stage(run_dir: RunDir, error: ShardReadError) -> tuple[int, Stage | None]:
    """Whose file the error names: a shard's result of a stage, or (None) its tar."""
    stem = error.path.rpartition("/")[2].partition(".")[0]
    if not stem.isdecimal():
        raise error
    index = int(stem)
    if error.path == str(run_dir.shard(index)):
        return index, None
    for stage in STAGES:
        if error.path == str(run_dir.result(stage, index)):
            return index, stage
    raise error
