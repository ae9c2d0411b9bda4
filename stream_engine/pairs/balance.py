"""Length balance: which pairs to drop so that chosen answers are not simply the longer ones.

A balance needs the whole dataset to decide about one pair. It works in two passes over the same
pairs in the same order: `count` each, then ask `reason_to_drop` for each. What it keeps in between
is a histogram over word counts, so its memory does not grow with the number of pairs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Literal, Protocol

from stream_engine.config import RankingConfig

LengthBalance = Literal["mean", "ratio"] | None

REASON = "length_balance"


class Lengths(Protocol):
    """What a balance sees of a pair."""

    @property
    def chosen_words(self) -> int: ...

    @property
    def rejected_words(self) -> int: ...


class Balance(Protocol):
    """Two passes: `count` every pair, then ask about every pair in the same order."""

    def count(self, candidate: Lengths) -> None:
        """First pass: take note of a pair."""

    def reason_to_drop(self, candidate: Lengths) -> str | None:
        """Second pass: None, or the reason to drop the pair."""


class NoBalance:
    """Keeps every pair."""

    def count(self, candidate: Lengths) -> None:
        """Nothing to note."""

    def reason_to_drop(self, candidate: Lengths) -> str | None:
        """Keep."""
        return None


class MeanBalance:
    """Drop the pairs whose chosen answer is longest, until the mean difference is small.

    Equal to: sort by words(chosen) - words(rejected), pop the largest while the mean difference
    exceeds `max_length_bias`. Of pairs with the same difference the first ones stay.
    When even the smallest differences exceed the bound nothing is left.
    """

    def __init__(self, max_length_bias: float) -> None:
        self.max_length_bias = max_length_bias
        self.pairs_at: Counter[int] = Counter()  # difference in words -> pairs
        self._quota: dict[int, int] | None = None

    def count(self, candidate: Lengths) -> None:
        assert self._quota is None, "counting after the first question"
        self.pairs_at[candidate.chosen_words - candidate.rejected_words] += 1

    def reason_to_drop(self, candidate: Lengths) -> str | None:
        if self._quota is None:
            self._quota = self._pairs_to_keep()
        difference = candidate.chosen_words - candidate.rejected_words
        if self._quota[difference] == 0:
            return REASON
        self._quota[difference] -= 1
        return None

    def _pairs_to_keep(self) -> dict[int, int]:
        """How many pairs of each difference stay."""
        keep = dict(self.pairs_at)
        num_pairs = sum(keep.values())
        total = sum(difference * n for difference, n in keep.items())
        for difference in sorted(keep, reverse=True):
            while keep[difference] and total > self.max_length_bias * num_pairs:
                keep[difference] -= 1
                num_pairs -= 1
                total -= difference
        return keep


class RatioBalance:
    """Drop the pairs whose chosen answer is shorter by more than a ratio, the best of 50 ratios.

    A pair is dropped when (words(rejected) - words(chosen)) / words(rejected) exceeds the ratio.
    Of the ratios 0.00, 0.02, ... 0.98 the first is taken at which
    |mean words(chosen) - mean words(rejected)| / mean words(rejected) is least. Ratios at which
    no pair is left are passed over.
    """

    NUM_RATIOS = 50

    def __init__(self) -> None:
        # by the index of the first ratio that keeps the pair
        self.chosen_words = [0] * self.NUM_RATIOS
        self.rejected_words = [0] * self.NUM_RATIOS
        self._best: int | None = None

    def count(self, candidate: Lengths) -> None:
        assert self._best is None, "counting after the first question"
        step = self.first_ratio(candidate)
        if step < self.NUM_RATIOS:
            self.chosen_words[step] += candidate.chosen_words
            self.rejected_words[step] += candidate.rejected_words

    def reason_to_drop(self, candidate: Lengths) -> str | None:
        if self._best is None:
            self._best = self._best_ratio()
        return None if self.first_ratio(candidate) <= self._best else REASON

    def first_ratio(self, candidate: Lengths) -> int:
        """Index of the smallest ratio that keeps the pair; NUM_RATIOS when none does."""
        shorter_by = candidate.rejected_words - candidate.chosen_words
        # the smallest i with shorter_by / rejected <= i / 50, in whole numbers
        return max(0, -(-shorter_by * self.NUM_RATIOS // max(1, candidate.rejected_words)))

    def _best_ratio(self) -> int:
        best, least = 0, None
        chosen = rejected = 0
        for step in range(self.NUM_RATIOS):
            chosen += self.chosen_words[step]
            rejected += self.rejected_words[step]
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

    def copy(self) -> Balances:
        """The same, to go on with by itself."""
        other = Balances(self.kind, self.config, self.round_of)
        other.of_rounds = copy.deepcopy(self.of_rounds)
        return other

    def of(self, index: int) -> Balance:
        """The balance that a shard's pairs take part in."""
        number = self.round_of(index)
        if number not in self.of_rounds:
            self.of_rounds[number] = length_balance(self.kind, self.config)
        return self.of_rounds[number]


def length_balance(kind: LengthBalance, config: RankingConfig) -> Balance:
    """The balance a pipeline asks for by its `length_balance`."""
    if kind == "mean":
        return MeanBalance(config.max_length_bias)
    if kind == "ratio":
        return RatioBalance()
    return NoBalance()
