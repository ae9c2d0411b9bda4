"""Filters over the candidate pairs of one sample.

A filter returns None, or the reason it drops the pair; the merger counts the reasons. A new
filter is one function here and one line in FILTERS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from stream_engine.config import RankingConfig
from stream_engine.pipelines.ranking import count_words
from stream_engine.records import Answer, PreferencePair
from stream_engine.text import reading

IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Candidate:
    """A pair with its two answers."""

    pair: PreferencePair
    chosen: Answer
    rejected: Answer

    @property
    def chosen_words(self) -> int:
        return count_words(self.chosen.text)

    @property
    def rejected_words(self) -> int:
        return count_words(self.rejected.text)

    @cached_property
    def readings(self) -> tuple[str, str]:
        return reading(self.chosen.text), reading(self.rejected.text)


Filter = Callable[[Candidate, Sequence[Candidate], RankingConfig], str | None]
"""(candidate, the sample's pairs kept so far, settings) -> None, or the reason to drop it."""


def empty_answer(candidate: Candidate, _kept: Sequence[Candidate], _: RankingConfig) -> str | None:
    """An answer without any word teaches nothing, and has no log-prob to compare."""
    if candidate.chosen_words and candidate.rejected_words:
        return None
    return "empty_answer"


def image_tag(candidate: Candidate, _kept: Sequence[Candidate], _: RankingConfig) -> str | None:
    """A literal `<image>` in an answer would be taken for an image by every trainer."""
    if IMAGE_TAG in candidate.chosen.text or IMAGE_TAG in candidate.rejected.text:
        return "image_tag"
    return None


def same_text(candidate: Candidate, _kept: Sequence[Candidate], _: RankingConfig) -> str | None:
    """Chosen and rejected are the same to a reader."""
    chosen, rejected = candidate.readings
    return "same_text" if chosen == rejected else None


def disagreement(
    candidate: Candidate, _kept: Sequence[Candidate], config: RankingConfig
) -> str | None:
    """The scorer reverses the order in which the input gave the pair."""
    is_reversed = candidate.chosen.given_as == "chosen" and candidate.pair.margin < 0
    return "disagreement" if is_reversed and config.disagreements == "drop" else None


def small_margin(
    candidate: Candidate, _kept: Sequence[Candidate], config: RankingConfig
) -> str | None:
    """The scores differ by less than `min_margin`, whichever is higher."""
    return "small_margin" if abs(candidate.pair.margin) < config.min_margin else None


def identical_row(candidate: Candidate, kept: Sequence[Candidate], _: RankingConfig) -> str | None:
    """The same two texts were paired before. Rows of different samples differ in their idx."""
    is_known = any(candidate.readings == other.readings for other in kept)
    return "identical_row" if is_known else None


def max_pairs(candidate: Candidate, kept: Sequence[Candidate], config: RankingConfig) -> str | None:
    """At most `max_pairs_per_sample` pairs of one sample."""
    return "max_pairs_per_sample" if len(kept) >= config.max_pairs_per_sample else None


FILTERS: tuple[Filter, ...] = (
    *(empty_answer, image_tag, same_text),
    *(disagreement, small_margin, identical_row, max_pairs),
)


def split_candidates(
    candidates: Sequence[Candidate], config: RankingConfig
) -> tuple[list[Candidate], list[tuple[Candidate, str]]]:
    """One sample's candidates, best first -> (those kept, those dropped with the reason)."""
    kept: list[Candidate] = []
    dropped: list[tuple[Candidate, str]] = []
    for candidate in candidates:
        reason = first_reason(candidate, kept, config)
        if reason is None:
            kept.append(candidate)
        else:
            dropped.append((candidate, reason))
    return kept, dropped


def first_reason(
    candidate: Candidate, kept: Sequence[Candidate], config: RankingConfig
) -> str | None:
    """The reason of the first filter that drops the candidate."""
    for check in FILTERS:
        reason = check(candidate, kept, config)
        if reason is not None:
            return reason
    return None
