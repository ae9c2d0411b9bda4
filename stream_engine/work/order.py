"""In which order a worker takes shards: its own, those of others, and deadly ones last."""

from __future__ import annotations

from collections.abc import Mapping

from stream_engine.ranks import Rank
from stream_engine.run_dir.failures import ShardFailure
from stream_engine.run_dir.state import Shard


def is_own(index: int, rank: Rank) -> bool:
    """Whether a shard is of those that this rank's worker begins with."""
    size = max(1, rank.num_workers)
    return index % size == rank.worker % size


def in_order(
    shards: Mapping[int, Shard], failures: Mapping[int, ShardFailure], rank: Rank, *, total: int
) -> list[Shard]:
    """This worker's own shards first, then those of others; deadly ones later.

    Each begins at a place of its own among those of others, so that they do not all ask for the
    same.

    Args:
        total: how many shards the run has.
    """
    size, total = max(1, rank.num_workers), max(1, total)
    start = rank.worker % size * total // size

    def place(index: int) -> tuple[int, bool, int]:
        num_deaths = failures[index].num_deaths if index in failures else 0
        own = is_own(index, rank)
        return num_deaths, not own, index if own else (index - start) % total

    return [shards[index] for index in sorted(shards, key=place)]
