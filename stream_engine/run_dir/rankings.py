"""What ranking made of a shard, kept beside its results: pairs that pass the filters, in numbers.

    magic | SHA-256 of the rest | msgpack

A ranking names the very results that it was made from, by their checksums, and the settings that
made it. It is derived: whoever finds none, a damaged one or one of something else makes it anew, so
that to delete these files costs time and nothing else.
"""

from __future__ import annotations

import msgspec

from stream_engine.config import STAGES
from stream_engine.errors import ShardReadError
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_identified
from stream_engine.run_dir.sealed import checked, keep_derived, read_derived
from stream_engine.store import files

MAGIC = b"SERANK\x00\x01"

Checksums = tuple[str, str]
"""Of a shard's rollouts and rewards, as the ends of their files tell them."""


class RankedPair(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A pair that passes the filters: what balance and statistics see of it."""

    sample: int
    """The place of its question in the shard."""
    chosen: int
    rejected: int
    chosen_score: float
    rejected_score: float
    chosen_words: int
    rejected_words: int
    chosen_finish: str
    rejected_finish: str

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score


class AnswerCounts(msgspec.Struct, kw_only=True):
    """What statistics say of some samples and their answers."""

    num_samples: int = 0
    num_answers: int = 0
    num_tokens: int = 0
    num_scored: int = 0
    num_brought: int = 0
    """Answers that came with their question."""
    finish_reasons: dict[str, int] = {}
    models: dict[str, int] = {}
    given_pairs: dict[str, int] = {}
    unscored: dict[str, int] = {}
    judge: dict[str, list[float]] = {}
    """The judge's counters of each sample that has them: their sum depends on the order."""


class RankedShard(msgspec.Struct, frozen=True, kw_only=True):
    """The ranking of one shard, and the counts of its answers."""

    settings: str
    """Hash of the settings and the code that made it."""
    results: Checksums
    pairs: list[RankedPair]
    """In the order of the samples, those of one best first."""
    dropped: dict[str, int]
    """Candidates that a filter dropped, by its reason."""
    num_samples_with_candidates: int
    counts: AnswerCounts

    @property
    def num_candidates(self) -> int:
        return len(self.pairs) + sum(self.dropped.values())


def read_ranking(run_dir: RunDir, index: int) -> RankedShard | None:
    """The ranking that is kept of a shard; None when there is none, or it cannot be read."""
    return read_derived(run_dir.ranking(index), MAGIC, RankedShard)


def keep_ranking(run_dir: RunDir, index: int, ranking: RankedShard) -> None:
    """Put a ranking in the place of the one that is there. Raises as `keep_derived`."""
    keep_derived(run_dir.ranking(index), MAGIC, ranking)


def is_damaged(run_dir: RunDir, index: int) -> bool:
    """Whether what is kept of a shard is not what was written, or cannot be read."""
    try:
        data = files.read_bytes(run_dir.ranking(index))
    except OSError:
        return True
    return data is not None and checked(data[len(MAGIC) :]) is None


def checksums(run_dir: RunDir, index: int) -> Checksums | None:
    """Of a shard's results as they are; None when one is missing or cut."""
    try:
        rollouts, rewards = (read_identified(run_dir.result(stage, index))[1] for stage in STAGES)
    except ShardReadError:
        return None
    return rollouts, rewards


def ranking_line(run_dir: RunDir, index: int) -> str:
    """What is kept of a shard, in a few words."""
    ranking = read_ranking(run_dir, index)
    if ranking is None:
        return f"{'damaged' if is_damaged(run_dir, index) else 'none'}; the next merge makes it"
    if ranking.results != checksums(run_dir, index):
        return "of earlier results; the next merge makes it again"
    num_questions = ranking.counts.num_samples
    return f"{len(ranking.pairs)} pairs of {num_questions} questions, before the balance"
