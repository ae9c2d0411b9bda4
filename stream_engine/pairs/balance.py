"""Length balance: which pairs to drop so that chosen answers are not simply the longer ones.

A balance needs the whole dataset to decide about one pair. It works in two passes over the same
pairs in the same order: `count` each, then ask `reason_to_drop` for each. Pairs fall into groups by
their word counts, and of each group the first so many stay. So what it keeps in between is a number
a group, its memory does not grow with the number of pairs, and to know what was decided about the
first pairs it is enough to know how many of each group there were.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from stream_engine.config import RankingConfig

LengthBalance = Literal["mean", "ratio"] | None

REASON = "length_balance"

Passed = dict[int, dict[int, int]]
"""Round -> group -> pairs that were decided about."""


class Lengths(Protocol):
    """What a balance sees of a pair."""

    @property
    def chosen_words(self) -> int: ...

    @property
    def rejected_words(self) -> int: ...


class BalanceCounts(msgspec.Struct):
    """What a balance has counted, by group."""

    pairs: dict[int, int] = {}
    chosen_words: dict[int, int] = {}
    """The sums of these, where they are wanted."""
    rejected_words: dict[int, int] = {}


class Balance(ABC):
    """Two passes: `count` every pair, then ask about every pair in the same order."""

    def __init__(self) -> None:
        self.counts = BalanceCounts()
        self.passed: Counter[int] = Counter()
        self._keep: Mapping[int, int] | None = None

    @abstractmethod
    def group_of(self, candidate: Lengths) -> int:
        """The group that a pair falls into."""

    @abstractmethod
    def pairs_to_keep(self) -> Mapping[int, int]:
        """How many pairs of each group stay, once all are counted."""

    def count(self, candidate: Lengths) -> None:
        """First pass: take note of a pair."""
        self.count_all([candidate])

    def count_all(self, candidates: Sequence[Lengths]) -> list[int]:
        """The same of many; returns their groups."""
        assert self._keep is None, "counting after the first question"
        groups, pairs = [self.group_of(one) for one in candidates], self.counts.pairs
        for group, n in Counter(groups).items():
            pairs[group] = pairs.get(group, 0) + n
        return groups

    def reason_to_drop(self, candidate: Lengths) -> str | None:
        """Second pass: None, or the reason to drop the pair."""
        return self.reasons_to_drop([candidate])[0]

    def reasons_to_drop(self, candidates: Sequence[Lengths]) -> list[str | None]:
        keep, passed = self.keep, self.passed
        reasons: list[str | None] = []
        for group in map(self.group_of, candidates):
            passed[group] += 1
            reasons.append(None if passed[group] <= keep[group] else REASON)
        return reasons

    @property
    def keep(self) -> Mapping[int, int]:
        if self._keep is None:
            self._keep = self.pairs_to_keep()
        return self._keep

    def dropped_of(self, passed: Mapping[int, int]) -> list[tuple[int, int]]:
        """How many of the first pairs are dropped of each group, so many of which these are."""
        keep = self.keep
        return sorted((g, n - keep.get(g, 0)) for g, n in passed.items() if n > keep.get(g, 0))

    def at(self, passed: Mapping[int, int]) -> Balance:
        """The same after so many pairs of each group."""
        other = copy.copy(self)
        other.passed = Counter(passed)
        return other


class NoBalance(Balance):
    """Keeps every pair."""

    def group_of(self, candidate: Lengths) -> int:
        """All are in one."""
        return 0

    def pairs_to_keep(self) -> Mapping[int, int]:
        """All."""
        return self.counts.pairs


class MeanBalance(Balance):
    """Drop the pairs whose chosen answer is longest, until the mean difference is small.

    Equal to: sort by words(chosen) - words(rejected), pop the largest while the mean difference
    exceeds `max_length_bias`. Of pairs with the same difference the first ones stay.
    When even the smallest differences exceed the bound nothing is left.
    """

    def __init__(self, max_length_bias: float) -> None:
        super().__init__()
        self.max_length_bias = max_length_bias

    def group_of(self, candidate: Lengths) -> int:
        """The difference in words."""
        return candidate.chosen_words - candidate.rejected_words

    def pairs_to_keep(self) -> Mapping[int, int]:
        keep = dict(self.counts.pairs)
        num_pairs = sum(keep.values())
        total = sum(difference * n for difference, n in keep.items())
        for difference in sorted(keep, reverse=True):
            while keep[difference] and total > self.max_length_bias * num_pairs:
                keep[difference] -= 1
                num_pairs -= 1
                total -= difference
        return keep


class RatioBalance(Balance):
    """Drop the pairs whose chosen answer is shorter by more than a ratio, the best of 50 ratios.

    A pair is dropped when (words(rejected) - words(chosen)) / words(rejected) exceeds the ratio.
    Of the ratios 0.00, 0.02, ... 0.98 the first is taken at which
    |mean words(chosen) - mean words(rejected)| / mean words(rejected) is least. Ratios at which
    no pair is left are passed over.
    """

    NUM_RATIOS = 50

    def group_of(self, candidate: Lengths) -> int:
        """Index of the smallest ratio that keeps the pair; NUM_RATIOS when none does."""
        shorter_by = candidate.rejected_words - candidate.chosen_words
        # the smallest i with shorter_by / rejected <= i / 50, in whole numbers
        return max(0, -(-shorter_by * self.NUM_RATIOS // max(1, candidate.rejected_words)))

    def count_all(self, candidates: Sequence[Lengths]) -> list[int]:
        groups = super().count_all(candidates)
        chosen, rejected = self.counts.chosen_words, self.counts.rejected_words
        for step, candidate in zip(groups, candidates):
            chosen[step] = chosen.get(step, 0) + candidate.chosen_words
            rejected[step] = rejected.get(step, 0) + candidate.rejected_words
        return groups

    def pairs_to_keep(self) -> Mapping[int, int]:
        best = self._best_ratio()
        return {step: n if step <= best else 0 for step, n in self.counts.pairs.items()}

    def _best_ratio(self) -> int:
        best, least = 0, None
        chosen = rejected = 0
        for step in range(self.NUM_RATIOS):
            chosen += self.counts.chosen_words.get(step, 0)
            rejected += self.counts.rejected_words.get(step, 0)
            if rejected == 0:
                continue
            # equal numbers of both, so the ratio of the means is the ratio of the sums
            imbalance = abs(chosen - rejected) / rejected
            if least is None or imbalance < least:
                best, least = step, imbalance
        return best


class Balances:
    """A balance for each round, so that later rounds change nothing of earlier ones."""

    def __init__(
        self, kind: LengthBalance, config: RankingConfig, round_of: Callable[[int], int]
    ) -> None:
        """`round_of` tells the round of a shard."""
        self.kind = kind
        self.config = config
        self.round_of = round_of
        self.of_rounds: dict[int, Balance] = {}

    def of(self, index: int) -> Balance:
        """The balance that a shard's pairs take part in."""
        return self.of_round(self.round_of(index))

    def of_round(self, number: int) -> Balance:
        if number not in self.of_rounds:
            self.of_rounds[number] = length_balance(self.kind, self.config)
        return self.of_rounds[number]

    @property
    def counts(self) -> dict[int, BalanceCounts]:
        """What was counted of each round."""
        return {number: balance.counts for number, balance in self.of_rounds.items()}

    def begin_with(self, counts: Mapping[int, BalanceCounts]) -> None:
        """Go on counting from there."""
        for number, of_round in counts.items():
            self.of_round(number).counts = of_round

    @property
    def passed(self) -> Passed:
        """The pairs that were decided about so far."""
        return {number: dict(balance.passed) for number, balance in self.of_rounds.items()}

    def dropped_of(self, passed: Passed) -> list[tuple[int, list[tuple[int, int]]]]:
        """What is dropped of the first pairs: with these, it tells the decision about each."""
        dropped = [(n, self.of_round(n).dropped_of(passed[n])) for n in sorted(passed)]
        return [one for one in dropped if one[1]]

    def at(self, passed: Passed) -> Balances:
        """The same, by itself, after so many pairs."""
        other = Balances(self.kind, self.config, self.round_of)
        for number, balance in self.of_rounds.items():
            other.of_rounds[number] = balance.at(passed.get(number, {}))
        return other


def length_balance(kind: LengthBalance, config: RankingConfig) -> Balance:
    """The balance a pipeline asks for by its `length_balance`."""
    if kind == "mean":
        return MeanBalance(config.max_length_bias)
    if kind == "ratio":
        return RatioBalance()
    return NoBalance()
