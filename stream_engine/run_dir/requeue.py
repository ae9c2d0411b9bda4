"""retry-failed: put failed shards and quarantined records back among what is left to do.

Inputs with rejected records are to be read again: an image that was missing may be there now, which
no file of the input tells. Samples that the run holds are passed over.

A result file is written again without its quarantined records: it then covers a part of its shard,
which is a state that every worker knows how to complete. So a retry may be interrupted, and may be
finished by any number of workers, like any other work.

A result that turns out to be damaged is set aside, and its shard put back: only then is it computed
again, since workers trust a result whose header and size are right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec

from stream_engine.config import STAGES
from stream_engine.errors import ChangedError, ConfigError, ShardReadError
from stream_engine.run_dir.damage import set_aside
from stream_engine.run_dir.failures import clear_failure
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.results import (
    RECORD_TYPES,
    quarantined_by,
    read_results,
    verify_result,
    write_results,
)
from stream_engine.run_dir.state import RunState, Shard, shard_lease
from stream_engine.store import files
from stream_engine.store.leases import Lease

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Requeued(msgspec.Struct, frozen=True):
    """What was put back; `rejected` are the records for whose sake inputs are read again."""

    shards: int
    records: int
    rejected: int


def requeue(state: RunState, *, worker: str, timeout_s: float) -> Requeued:
    """Put back every failed shard, every record that a stage set aside, and inputs with rejects.

    Raises:
        ConfigError: when a worker is at one of these shards, or reads the input.
    """
    forget_inputs(state, worker=worker, timeout_s=timeout_s)
    num_shards = num_records = 0
    for shard in state.refresh().shards:
        failed = state.failure(shard) is not None
        headers = [header for stage in STAGES if (header := state.header(stage, shard))]
        has_more = failed or any(header.num_quarantined for header in headers)
        if not has_more and not is_damaged(state, shard):
            continue
        name = shard_lease(shard.index)
        lease = Lease.acquire(state.run_dir.leases_dir, name, worker_id=worker, timeout_s=timeout_s)
        if lease is None:
            raise ConfigError(f"a worker is at shard {shard.index}; retry when the run has ended")
        with lease:
            put_back = in_spite_of_changes(lease, requeue_results, state, shard)
            if failed:
                in_spite_of_changes(lease, clear_failure, state.run_dir, shard.index)
        num_shards += failed or put_back is None
        num_records += put_back or 0
    return Requeued(num_shards, num_records, state.num_rejected())


def is_damaged(state: RunState, shard: Shard) -> bool:
    """Whether a result of the shard is not what was written, though its header and size are."""
    try:
        for stage in STAGES:
            if (header := state.header(stage, shard)) is not None:
                verify_result(state.run_dir.result(stage, shard.index))
                for _ in quarantined_by(state.run_dir, header):
                    pass
    except ShardReadError:
        return True
    return False


def requeue_results(state: RunState, shard: Shard) -> int | None:
    """Write a shard's results again without quarantined records; returns how many those were.

    None says that a result was damaged and is out of the way now: the shard is done again.
    """
    num_records = 0
    state.refresh_shard(shard)
    for stage in STAGES:
        header = state.header(stage, shard)
        if header is None:
            continue
        path = state.run_dir.result(stage, shard.index)
        version = files.version_of(path)
        try:
            records = list(read_results(path, RECORD_TYPES[stage]))
        except ShardReadError as error:
            kept = set_aside(state.run_dir, stage, shard.index)
            logger.warning("%s; it is kept as %s and made again", error, kept)
            return None
        if header.num_quarantined:
            part = msgspec.structs.replace(
                header, num_samples=header.num_results, num_quarantined=0
            )
            write_results(state.run_dir, part, records, [], over=version)
            num_records += header.num_quarantined
    return num_records


def forget_inputs(state: RunState, *, worker: str, timeout_s: float) -> None:
    """Let every input with rejected records be read again."""
    lease = Lease.acquire(state.run_dir.leases_dir, "ingest", worker_id=worker, timeout_s=timeout_s)
    if lease is None:
        raise ConfigError("a worker is reading the input; retry when it has been read")

    def forget() -> None:
        manifest = Manifest.load(state.run_dir)
        for source, info in list(manifest.inputs.items()):
            if info.rejected and info.fingerprint:
                manifest.forget_input(source)

    with lease:
        in_spite_of_changes(lease, forget)


def in_spite_of_changes(lease: Lease, work: Callable[..., T], *arguments: object) -> T:
    """What `work` returns; it is called again when a file had changed, while the lease is held.

    Whoever comes after a process that was ended finishes what that had begun, and is told so.

    Raises:
        LeaseLostError: when another process took over.
    """
    while True:
        try:
            return work(*arguments)
        except ChangedError:
            lease.verify()
