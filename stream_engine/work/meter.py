"""Throughput of a run, for the live view.

Counts this worker's records as they are made, and
everybody's as their result files appear."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stream_engine.config import Stage
from stream_engine.run_dir.state import RunState
from stream_engine.work.progress import Progress, WorkerRow

MIN_ELAPSED_S = 5.0  # before that, a rate tells nothing about the time to come


class Meter:
    """`made` is called for every record; `progress` sums up."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.started = time.time()
        self.is_running = False
        self.num_done_before: int | None = None
        self.outcomes_in_shard = 0
        self.tokens_in_shard = 0

    @contextmanager
    def shard(self) -> Iterator[None]:
        """Count one shard; the first one starts the clock, so that loading models is left out."""
        if not self.is_running:
            self.is_running = True
            self.started = time.time()
        try:
            yield
        finally:
            self.outcomes_in_shard = self.tokens_in_shard = 0

    def made(self, outcomes: int, tokens: int) -> None:
        self.outcomes_in_shard += outcomes
        self.tokens_in_shard += tokens

    def progress(self, state: RunState, doing: str) -> Progress:
        """Where the run stands, as of the state's last refresh."""
        complete = [
            shard
            for shard in state.shards
            if all(state.is_complete(stage, shard) for stage in self.stages)
        ]
        done = sum(shard.num_samples for shard in complete)
        if self.num_done_before is None:
            self.num_done_before = done
        elapsed = max(1e-3, time.time() - self.started)
        in_shard = self.outcomes_in_shard / max(1, len(self.stages))
        rate = (done - self.num_done_before + in_shard) / elapsed
        tokens = self.tokens_in_shard
        workers: dict[str, list[float]] = {}  # questions, tokens, seconds of each worker
        for stage in self.stages:
            for shard in state.shards:
                header = state.header(stage, shard)
                by = {} if header is None else header.created_by
                if header is None or by.get("finished", 0.0) < self.started:
                    continue
                tokens += by["tokens"]
                sums = workers.setdefault(by["worker"], [0.0, 0.0, 0.0])
                sums[0] += header.num_samples / len(self.stages)
                sums[1] += by["tokens"]
                sums[2] += by["seconds"]
        total = sum(shard.num_samples for shard in state.shards)
        failed = sum(state.is_failed(shard) for shard in state.shards)
        return Progress(
            doing=doing,
            samples_done=min(total, done + round(in_shard)),
            samples_total=total,
            shards_done=len(complete),
            shards_total=len(state.shards),
            shards_failed=failed,
            quarantined=state.num_rejected()
            + sum(state.num_quarantined(stage) for stage in self.stages),
            questions_per_s=rate or None,
            tokens_per_s=tokens / elapsed or None,
            eta_s=(total - done - in_shard) / rate if rate and elapsed > MIN_ELAPSED_S else None,
            workers=tuple(
                WorkerRow(
                    name=lease.worker_id,
                    doing=f"shard {index}",
                    since_s=lease.held_s,
                    questions_per_s=_rate(workers.get(lease.worker_id), 0),
                    tokens_per_s=_rate(workers.get(lease.worker_id), 1),
                )
                for index, lease in sorted(state.holders().items())
            ),
        )


def _rate(sums: list[float] | None, which: int) -> float | None:
    return sums[which] / sums[2] if sums and sums[2] else None
