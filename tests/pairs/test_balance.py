"""Length balance: equal to the slow rules it stands for, at any size, in flat memory."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from stream_engine.config import RankingConfig
from stream_engine.pairs.balance import Balances, MeanBalance, RatioBalance, length_balance
from stream_engine.pairs.filters import Candidate
from stream_engine.records import Answer, PreferencePair


def of_lengths(chosen: int, rejected: int) -> Candidate:
    def answer(index: int, text: str) -> Answer:
        return Answer(
            index=index, text=text, token_ids=[1], token_logps=[-1.0], finish_reason="length"
        )

    pair = PreferencePair(key="k", chosen=0, rejected=1, chosen_score=1.0, rejected_score=0.0)
    return Candidate(pair, answer(0, "c " * chosen), answer(1, "r " * rejected))


def kept_by(balance: MeanBalance | RatioBalance, pairs: list[Candidate]) -> list[int]:
    for pair in pairs:
        balance.count(pair)
    return [i for i, pair in enumerate(pairs) if balance.reason_to_drop(pair) is None]


def random_pairs(rng: random.Random, *, longer_by: int) -> list[Candidate]:
    return [
        of_lengths(rng.randrange(1, 12) + rng.randrange(longer_by + 1), rng.randrange(1, 12))
        for _ in range(rng.randrange(1, 60))
    ]


def pop_longest_until_balanced(pairs: list[Candidate], bound: float) -> list[int]:
    """The rule of the ancestor: sort by difference, pop while the mean exceeds the bound."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].chosen_words - pairs[i].rejected_words)
    while order:
        differences = [pairs[i].chosen_words - pairs[i].rejected_words for i in order]
        if Fraction(sum(differences), len(differences)) <= Fraction(bound):
            break
        order.pop()
    return sorted(order)


def try_every_ratio(pairs: list[Candidate]) -> list[int]:
    """The rule of the ancestor: of the ratios 0.00, 0.02 ... 0.98 the one of least imbalance."""
    best, least = [], None
    for step in range(50):
        kept = [
            i
            for i, pair in enumerate(pairs)
            if Fraction(pair.rejected_words - pair.chosen_words, pair.rejected_words)
            <= Fraction(step, 50)
        ]
        if not kept:
            continue
        mean_chosen = Fraction(sum(pairs[i].chosen_words for i in kept), len(kept))
        mean_rejected = Fraction(sum(pairs[i].rejected_words for i in kept), len(kept))
        imbalance = abs(mean_chosen - mean_rejected) / mean_rejected
        if least is None or imbalance < least:
            best, least = kept, imbalance
    return best


@pytest.mark.parametrize("bound", [0.0, 0.5, 2.0])
def test_mean_balance_keeps_what_popping_one_by_one_keeps(bound: float) -> None:
    rng = random.Random(0)
    num_balanced = 0
    for _ in range(300):
        pairs = random_pairs(rng, longer_by=rng.randrange(6))
        expected = pop_longest_until_balanced(pairs, bound)
        assert kept_by(MeanBalance(bound), pairs) == expected
        num_balanced += len(expected) < len(pairs)
    assert num_balanced > 50


def test_ratio_balance_keeps_what_trying_every_ratio_keeps() -> None:
    rng = random.Random(1)
    num_balanced = 0
    for _ in range(300):
        pairs = random_pairs(rng, longer_by=rng.randrange(3))
        expected = try_every_ratio(pairs)
        assert kept_by(RatioBalance(), pairs) == expected
        num_balanced += len(expected) < len(pairs)
    assert num_balanced > 50


def test_of_equally_good_ratios_the_smallest_is_taken() -> None:
    pairs = [of_lengths(11, 10), of_lengths(7, 10)]  # imbalance 1/10 alone, 2/20 together
    assert kept_by(RatioBalance(), pairs) == [0]


def test_of_equally_long_pairs_the_first_stay() -> None:
    pairs = [of_lengths(5, 3), of_lengths(5, 3), of_lengths(3, 5), of_lengths(5, 3)]
    assert kept_by(MeanBalance(0.0), pairs) == [0, 2]


@pytest.mark.parametrize("kind", ["mean", "ratio", None])
def test_no_pairs_at_all_is_no_error(kind: str | None) -> None:
    """The ancestor's length filter divided by zero on an empty list."""
    balance = length_balance(kind, RankingConfig())
    assert kept_by(balance, []) == []


def test_pairs_that_cannot_be_balanced_are_all_dropped_not_an_error() -> None:
    assert kept_by(MeanBalance(0.5), [of_lengths(4, 2), of_lengths(3, 2)]) == []
    assert kept_by(RatioBalance(), [of_lengths(1, 100)]) == []


def test_balance_needs_memory_for_word_counts_not_for_pairs() -> None:
    """The ancestor's filter was quadratic and held every pair."""
    mean, ratio = MeanBalance(0.5), RatioBalance()
    lengths = [of_lengths(chosen, 10) for chosen in range(1, 30)]
    for pair in lengths * 1000:
        mean.count(pair)
        ratio.count(pair)
    assert len(mean.counts.pairs) == len(lengths)
    assert len(ratio.counts.chosen_words) == 10  # 9 ratios of shorter ones, one of all others


def test_lengths_are_balanced_within_a_round() -> None:
    """Later rounds decide nothing about the pairs of earlier ones, nor these about later ones."""
    first = [of_lengths(12 + i, 10) for i in range(6)] + [of_lengths(8, 10)] * 4
    second = [of_lengths(30 + i, 10) for i in range(8)] + [of_lengths(5, 10)] * 3
    alone = [kept_by(MeanBalance(0.5), pairs) for pairs in (first, second)]
    assert [len(kept) < len(pairs) for kept, pairs in zip(alone, (first, second))] == [True, True]
    balances = Balances("mean", RankingConfig(), lambda shard: 1 + (shard >= 5))
    for shard, pairs in ((0, first), (7, second)):
        for pair in pairs:
            balances.of(shard).count(pair)
    for again in (balances.at({}), balances):
        assert [
            [i for i, pair in enumerate(pairs) if again.of(shard).reason_to_drop(pair) is None]
            for shard, pairs in ((4, first), (5, second))
        ] == alone
