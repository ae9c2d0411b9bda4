"""Which answers a critic compares: everyone with everyone, some pairs, or a Swiss tournament.

A match is an unordered pair of answers, (lower, higher) index, and costs two verdicts: one in each
order. Answers to a question are drawn alike, so their index is as good as a lot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, islice
from typing import Literal

Match = tuple[int, int]
Schedule = Literal["all", "swiss"] | int
"""A number is that of the matches of one question."""

VERDICTS_PER_MATCH = 2


def num_matches(schedule: Schedule, num_answers: int) -> int:
    """How many matches a question with `num_answers` different answers has, at most."""
    everyone = num_answers * (num_answers - 1) // 2
    if schedule == "all":
        return everyone
    if schedule == "swiss":
        return min(everyone, num_rounds(schedule, num_answers) * (num_answers // 2))
    return min(everyone, schedule)


def num_rounds(schedule: Schedule, num_answers: int) -> int:
    """Rounds, each of which knows the verdicts before it: 1, or Swiss: floor(log2(answers)).

    Ten answers have 3 rounds, 15 of 45 matches. Nobody sits out all of them.
    """
    if num_answers < 2:
        return 0
    rounds = max(num_answers.bit_length() - 1, 1 + num_answers % 2)
    return rounds if schedule == "swiss" else 1


def fixed_matches(schedule: Schedule, answers: Sequence[int]) -> list[Match]:
    """The matches of a schedule that does not look at verdicts.

    A number of matches takes them from a round-robin, so that no answer plays two more than
    another.
    """
    assert schedule != "swiss"
    if schedule == "all":
        return list(combinations(answers, 2))
    return list(islice(round_robin(answers), schedule))


def round_robin(answers: Sequence[int]) -> Iterator[Match]:
    """All matches, round after round of disjoint ones (circle method; one sits out when odd)."""
    circle: list[int | None] = [*answers, *([None] if len(answers) % 2 else [])]
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        for one, other in zip(circle[:half], reversed(circle[half:])):
            if one is not None and other is not None:
                yield (min(one, other), max(one, other))
        circle.insert(1, circle.pop())


def swiss_matches(standing: Sequence[int], played: Collection[Match]) -> list[Match]:
    """One Swiss round: each answer, best first, meets the next best it has not met."""
    free, matches = list(standing), []
    while free:
        one = free.pop(0)
        for other in free:
            match = (min(one, other), max(one, other))
            if match not in played:
                matches.append(match)
                free.remove(other)
                break
    return matches
