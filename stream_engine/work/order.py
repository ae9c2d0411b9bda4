"""In which order a worker takes shards: its own, those of others, and deadly ones last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stream_engine.config import Stage
from stream_engine.ranks import Rank
from stream_engine.run_dir.state import RunState


def is_own(index: int, rank: Rank) -> bool:
    """Whether a shard is of those that this rank's worker begins with."""
    size = max(1, rank.num_workers)
    return index % size == rank.worker % size


def in_order(state: RunState, stages: Sequence[Stage], shards: range, rank: Rank) -> Iterator[int]:
    """Those of these shards with work left: this worker's own, those of others, deadly ones.

    Each begins at a place of its own among those of others, so that they do not all ask for the
    same. What comes later is looked for only when it is asked for: of ten thousand shards a worker
    of a thousand has ten of its own.
    """
    total = max(1, len(state.shards))
    size = max(1, rank.num_workers)
    mine = rank.worker % size
    start = mine * total // size
    deadly = {index: failure.num_deaths for index, failure in state.failures.items()}
    deadly = {index: number for index, number in deadly.items() if number}
    first = shards.start + (mine - shards.start) % size
    for index in range(first, shards.stop, size):
        if index not in deadly and state.is_left(stages, index):
            yield index
    others = [
        index
        for index in state.missing(stages)
        if index in shards
        and index not in deadly
        and index % size != mine
        and state.is_left(stages, index)
    ]
    yield from sorted(others, key=lambda index: (index - start) % total)

    def place(index: int) -> tuple[int, bool, int]:
        own = index % size == mine
        return deadly[index], not own, index if own else (index - start) % total

    yield from sorted((i for i in deadly if i in shards and state.is_left(stages, i)), key=place)
