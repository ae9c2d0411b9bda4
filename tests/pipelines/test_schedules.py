"""Which answers are compared."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from stream_engine.pipelines.schedules import (
    fixed_matches,
    num_matches,
    num_rounds,
    round_robin,
    swiss_matches,
)

SIZES = range(2, 12)


@pytest.mark.parametrize("size", SIZES)
def test_round_robin_is_every_pair_once(size):
    matches = list(round_robin(range(size)))
    assert sorted(matches) == list(combinations(range(size), 2))


@pytest.mark.parametrize("size", SIZES)
def test_all_is_every_pair_once(size):
    answers = list(range(0, 3 * size, 3))  # indices with gaps
    matches = fixed_matches("all", answers)
    assert sorted(matches) == list(combinations(answers, 2))
    assert len(matches) == num_matches("all", size)


@pytest.mark.parametrize("size", SIZES)
def test_a_number_of_matches_is_spread_evenly(size):
    for number in range(1, size * size):
        matches = fixed_matches(number, range(size))
        played = Counter(index for match in matches for index in match)
        assert len(set(matches)) == len(matches) == num_matches(number, size)
        assert max(played.values()) - min(played[i] for i in range(size)) <= 2 - (size % 2 == 0)


@pytest.mark.parametrize("size", SIZES)
def test_swiss_rounds_have_no_rematch_and_no_more_matches_than_planned(size):
    played: list[tuple[int, int]] = []
    wins: Counter[int] = Counter()
    for _ in range(num_rounds("swiss", size)):
        matches = swiss_matches(sorted(range(size), key=lambda i: (-wins[i], i)), played)
        assert matches, "a round without matches"
        indices = [index for match in matches for index in match]
        assert len(set(indices)) == len(indices)
        assert not set(matches) & set(played)
        played += matches
        wins.update(min(match) for match in matches)  # the lower index is the better answer
    assert len(played) <= num_matches("swiss", size)
    assert max(range(size), key=lambda i: (wins[i], -i)) == 0


def test_swiss_meets_those_of_like_standing():
    assert swiss_matches([3, 1, 2, 0], [(1, 3)]) == [(2, 3), (0, 1)]


@pytest.mark.parametrize(
    ("schedule", "matches"), [("all", 45), ("swiss", 15), (12, 12), (100, 45), (1, 1)]
)
def test_the_number_of_matches_of_ten_answers(schedule, matches):
    assert num_matches(schedule, 10) == matches


def test_a_lone_answer_has_no_rounds():
    assert num_rounds("all", 1) == num_rounds("swiss", 1) == num_rounds(5, 0) == 0
