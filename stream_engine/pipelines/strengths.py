"""Bradley-Terry strengths: what the matches of a tournament say of its players, taken together.

A win against a strong player counts for more than one against a weak player, which wins minus
losses does not see. It matters where few matches are played, and most where, as in a Swiss
tournament, equal players meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

STEPS = 100
PRIOR = 0.5
"""Wins and losses that everybody has against a player of strength 1, so that none is infinite."""

DIGITS = 6
"""After the point: what the order of summing leaves behind them must not part equal players."""


def log_strengths(
    players: Sequence[int], results: Iterable[tuple[int, int, float]]
) -> dict[int, float]:
    """The natural logarithm of every player's strength; 0 is the average of what is presumed.

    The probability that i beats j is s_i / (s_i + s_j) (Bradley and Terry, 1952); the strengths are
    found by the MM steps of Hunter (2004, "MM algorithms for generalized Bradley-Terry models").

    Args:
        results: (one, other, outcome) of every match: 1 one has won, -1 the other, 0 a tie, which
            is half a win of each, and what lies between accordingly.
    """
    matches = list(results)
    won = dict.fromkeys(players, PRIOR)
    for one, other, outcome in matches:
        won[one] += (1 + outcome) / 2
        won[other] += (1 - outcome) / 2
    strength = dict.fromkeys(players, 1.0)
    for _ in range(STEPS):
        share = {player: 2 * PRIOR / (strength[player] + 1) for player in players}
        for one, other, _ in matches:
            both = 1 / (strength[one] + strength[other])
            share[one] += both
            share[other] += both
        strength = {player: won[player] / share[player] for player in players}
    return {player: round(math.log(strength[player]), DIGITS) for player in players}
