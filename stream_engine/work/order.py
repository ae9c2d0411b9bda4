"""In which order a worker takes shards, and how often it looks at what others have done.

Its own come first, then those of others, and deadly ones last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stream_engine.config import Stage
from stream_engine.pairs.merge_inputs import named_shards
from stream_engine.ranks import Rank
from stream_engine.run_dir.state import RunState, Shard

IDLE_S = 0.25
MANY_WORKERS = 16
MANY_SHARDS = 1000
"""Of more workers each looks less often, and where folders of more shards have to be listed, so
that all of them together have no more names listed a second. A worker that does its own shards
loses nothing by that."""
MANY_DONE = 16
"""So many shards that others have done since a worker looked are worth another look at all."""


def is_own(index: int, rank: Rank) -> bool:
    """Whether a shard is of those that this rank's worker begins with."""
    size = max(1, rank.num_workers)
    return index % size == rank.worker % size


def looks_apart_s(state: RunState, rank: Rank) -> float:
    """Seconds between two looks of a worker that finds nothing to do."""
    longer = rank.num_workers / MANY_WORKERS
    if not state.asks_by_name(state.most_missing):
        longer *= max(1.0, len(state.shards) / MANY_SHARDS)
    return IDLE_S * max(1.0, longer)


def waited_for(state: RunState) -> str:
    """What a worker waits for that finds nothing to do, in words."""
    held = {lease.worker_id: index for index, lease in sorted(state.holders().items())}
    if held:
        worker, index = next(iter(held.items()))
        more = f" and {len(held) - 1} more" * (len(held) > 1)
        return f"waiting for {worker} (shard {index}){more}"
    failed = [shard for shard in state.shards if shard.index in state.failures]
    waits = [shard.index for shard in failed if state.wait_s(shard) and not state.is_failed(shard)]
    if waits:
        return f"waiting to try {named_shards(waits)} again"
    return "waiting for other workers"


def is_takeable(state: RunState, stages: Sequence[Stage], shard: Shard) -> bool:
    """Whether something of these stages is left to do, and may be done now."""
    return (
        not state.is_settled(stages, shard)
        and state.wait_s(shard) == 0
        and (stages[0] == "rollouts" or state.is_complete("rollouts", shard))
    )


def in_order(state: RunState, stages: Sequence[Stage], shards: range, rank: Rank) -> Iterator[int]:
    """Those of these shards with work left: this worker's own, those of others, deadly ones.

    Each begins at a place of its own among those of others, so that they do not all ask for the
    same. What comes later is looked for only when it is asked for: of ten thousand shards a worker
    of a thousand has ten of its own.
    """
    total, size = max(1, len(state.shards)), max(1, rank.num_workers)
    mine = rank.worker % size
    start = mine * total // size
    deadly = {i: failure.num_deaths for i, failure in state.failures.items() if failure.num_deaths}
    own = range(shards.start + (mine - shards.start) % size, shards.stop, size)

    def is_left(index: int) -> bool:
        return index in shards and state.is_left(stages, index)

    yield from (index for index in own if index not in deadly and is_left(index))
    others = state.missing(stages).difference(own, deadly)
    yield from sorted(filter(is_left, others), key=lambda index: (index - start) % total)

    def place(index: int) -> tuple[int, bool, int]:
        is_mine = index in own
        return deadly[index], not is_mine, index if is_mine else (index - start) % total

    yield from sorted(filter(is_left, deadly), key=place)
