"""Verify a run byte by byte: shards and rejects against the manifest, results against shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from stream_engine.config import STAGES
from stream_engine.errors import ShardReadError
from stream_engine.run_dir.rankings import is_damaged
from stream_engine.run_dir.results import (
    RECORD_TYPES,
    quarantined_by,
    read_quarantine,
    read_results,
)
from stream_engine.run_dir.shards import read_shard
from stream_engine.run_dir.state import RunState


def damaged_parts(state: RunState) -> Iterator[str]:
    """A line for every damaged file of rejects, shard or result, and for samples that no result
    accounts for.

    Shards that the next run works on are one line together.
    """
    yield from damaged_rejects(state)
    num_pending = 0
    for info, shard in zip(state.manifest.shards, state.shards):
        try:
            for _ in read_shard(state.run_dir.shard(info.index), info):
                pass
            if is_damaged(state.run_dir, info.index):
                yield (
                    f"{state.run_dir.ranking(info.index)}: is not what was written; delete it, "
                    "whoever needs it makes it again"
                )
            for stage in STAGES:
                header = state.header(stage, shard)
                if header is None:
                    continue
                for _ in quarantined_by(state.run_dir, header):
                    pass
                path = state.run_dir.result(stage, info.index)
                for record in read_results(path, RECORD_TYPES[stage]):
                    if record.key not in info.keys:
                        yield f"{path}: {record.key} is not in the shard"
        except ShardReadError as error:
            yield str(error)
        if not state.is_settled(STAGES, shard):
            num_pending += 1
            continue
        for stage in STAGES:
            if not state.is_complete(stage, shard):
                yield f"shard {info.index}: the {stage} do not account for every sample"
    if num_pending:
        yield f"{num_pending} of {len(state.shards)} shards pending; run it again"


def damaged_rejects(state: RunState) -> Iterator[str]:
    """A line for every file of rejected records that does not hold what was rejected."""
    for info in state.manifest.inputs.values():
        path, expected = state.run_dir.quarantine(info.quarantine), Counter(info.rejected)
        if not info.quarantine:
            continue
        try:
            found = Counter(failure.reason for failure in read_quarantine(path))
        except ShardReadError as error:
            yield str(error)
            continue
        if found != expected:
            yield f"{path}: {found.total()} records, the manifest says {expected.total()}"
