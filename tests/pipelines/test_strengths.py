"""Bradley-Terry strengths are those of the likelihood's maximum, and of no order of matches."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from stream_engine.pipelines.strengths import PRIOR, log_strengths


def log_posterior(strengths: dict[int, float], results: list[tuple[int, int, float]]) -> float:
    """The logarithm of what log_strengths maximises, written down once more."""

    def log_win(a: float, b: float) -> float:
        return -math.log1p(math.exp(b - a))

    total = sum(PRIOR * (log_win(s, 0) + log_win(0, s)) for s in strengths.values())
    for one, other, outcome in results:
        a, b = strengths[one], strengths[other]
        total += (1 + outcome) / 2 * log_win(a, b) + (1 - outcome) / 2 * log_win(b, a)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_no_step_away_is_more_likely(seed: int) -> None:
    rng = random.Random(seed)
    players = list(range(6))
    pairs = rng.sample(list(itertools.combinations(players, 2)), 9)
    results = [(a, b, rng.choice((-1.0, -0.5, 0.0, 0.5, 1.0))) for a, b in pairs]
    found = log_strengths(players, results)
    best = log_posterior(found, results)
    for player, step in itertools.product(players, (-0.02, 0.02)):
        assert log_posterior(found | {player: found[player] + step}, results) < best
    shuffled = rng.sample(results, len(results))
    assert log_strengths(players, shuffled) == pytest.approx(found)


def test_who_wins_all_is_finite_and_who_met_nobody_is_average() -> None:
    found = log_strengths([0, 1, 2], [(0, 1, 1.0), (0, 1, 1.0)])
    assert found[0] > 0 > found[1]
    assert math.isfinite(found[0])
    assert found[2] == pytest.approx(0.0)
    assert log_strengths([], []) == {}


def test_a_win_over_a_strong_player_counts_for_more() -> None:
    found = log_strengths([0, 1, 2, 3], [(0, 2, 1.0), (2, 3, 1.0), (1, 3, 1.0)])
    assert found[0] > found[1]
