"""llava_critic on the drawn world: ways to make scores and pairs of the same verdicts.

    stream-engine run --demo --pipeline_name llava_critic --work_dir RUN
    stream-engine run --demo --pipeline_name llava_critic --work_dir GREEDY --critic_temperature 0
    python -m tests.benchmarks.critics RUN GREEDY

Each run's verdicts (all answers against all, in both orders) are scored by each way, and paired as
the pipeline pairs. A verdict depends on the question and the two answers alone, so that a shorter
schedule would have got the same ones: those it would not have asked for are left out. Printed is a
table: calls of the critic a question, pairs, the share of them whose chosen answer has fewer wrong
facts (a draw counts half), and its 95 % interval (of the mean, questions drawn again, 2,000 times).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import msgspec

from stream_engine.demo.facts import count_wrong_facts
from stream_engine.demo.world import scene_of
from stream_engine.pipelines.llava_critic import LlavaCriticOptions
from stream_engine.pipelines.schedules import Match, fixed_matches, swiss_matches
from stream_engine.pipelines.strengths import log_strengths
from stream_engine.pipelines.verdicts import VALUES
from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.shards import read_shard

Verdicts = Mapping[Match, float]
"""By (first, second) answer: 1 the first is better, -1 the second, 0 neither."""
Scores = dict[int, float]
RANK = 3
DRAWS = 2000


@dataclass(frozen=True)
class Question:
    """One question: every verdict, and the truth of every answer."""

    verdicts: dict[Match, float]
    wrong: dict[int, int]
    """Wrong facts of an answer."""

    @property
    def players(self) -> list[int]:
        return sorted({i for order in self.verdicts for i in order})


def questions_of(run_dir: RunDir) -> Iterator[Question]:
    """All questions of a finished run."""
    for info in Manifest.load(run_dir).shards:
        idx = dict(zip(info.keys, info.ids))
        rollouts = read_results(run_dir.result("rollouts", info.index), SampleRollouts)
        answers = {r.key: r for r in rollouts}
        asked = {s.key: s.question for s in read_shard(run_dir.shard(info.index), info)}
        for rewards in read_results(run_dir.result("rewards", info.index), SampleRewards):
            verdicts = {
                (c["first"], c["second"]): float(VALUES.get(c["verdict"], 0))
                for c in rewards.details["comparisons"]
            }
            scene = scene_of(idx[rewards.key])
            wrong = {
                answer.index: count_wrong_facts(scene, asked[rewards.key], answer.text)
                for answer in answers[rewards.key].answers
            }
            yield Question(verdicts, wrong)


# -- scores ---------------------------------------------------------------------------------------


def agreed(verdicts: Verdicts, match: Match) -> float:
    """1, -1 or 0: what both orders say of a match; 0 where they differ."""
    there, back = verdicts.get(match, 0.0), -verdicts.get(match[::-1], 0.0)
    return there if there == back else 0.0


def mean(verdicts: Verdicts, match: Match) -> float:
    """The mean of both orders: one that calls a tie leaves half of the other."""
    return (verdicts.get(match, 0.0) - verdicts.get(match[::-1], 0.0)) / 2


Outcome = Callable[[Verdicts, Match], float]


def wins_minus_losses(
    verdicts: Verdicts, players: Sequence[int], matches: Sequence[Match], outcome: Outcome
) -> Scores:
    scores = dict.fromkeys(players, 0.0)
    for one, other in matches:
        result = outcome(verdicts, (one, other))
        scores[one] += result
        scores[other] -= result
    return scores


def bradley_terry(
    verdicts: Verdicts, players: Sequence[int], matches: Sequence[Match], outcome: Outcome
) -> Scores:
    """Strengths, as `critic_scores bradley_terry` has them."""
    return log_strengths(players, ((*match, outcome(verdicts, match)) for match in matches))


def with_opponents(
    verdicts: Verdicts, players: Sequence[int], matches: Sequence[Match], outcome: Outcome
) -> Scores:
    """Wins minus losses; equal ones by the wins of those whom they beat (Sonneborn-Berger)."""
    scores = wins_minus_losses(verdicts, players, matches, outcome)
    finer = dict(scores)
    for one, other in matches:
        result = outcome(verdicts, (one, other))
        finer[one] += result * scores[other] / 1000
        finer[other] -= result * scores[one] / 1000
    return finer


# -- schedules: the matches of a question, given what its critic would say ------------------------


def everyone(question: Question) -> list[Match]:
    return fixed_matches("all", question.players)


def some(number: int) -> Callable[[Question], list[Match]]:
    return lambda question: fixed_matches(number, question.players)


def swiss(rounds: int) -> Callable[[Question], list[Match]]:
    def matches_of(question: Question) -> list[Match]:
        matches: list[Match] = []
        for _ in range(rounds):
            score = bradley_terry(question.verdicts, question.players, matches, mean)
            standing = sorted(question.players, key=lambda i: (-score[i], i))
            matches += swiss_matches(standing, matches)
        return matches

    return matches_of


def ends(first_rounds: int, budget: int) -> Callable[[Question], list[Match]]:
    """Swiss rounds, and what is left of the budget among those at the top and at the bottom."""

    def matches_of(question: Question) -> list[Match]:
        matches = swiss(first_rounds)(question)
        while len(matches) < min(budget, len(everyone(question))):
            score = bradley_terry(question.verdicts, question.players, matches, mean)
            standing = sorted(question.players, key=lambda i: (-score[i], i))
            free = [
                (min(a, b), max(a, b))
                for group in (standing[: RANK + 1], standing[-RANK - 1 :], standing)
                for a, b in combinations(group, 2)
                if (min(a, b), max(a, b)) not in matches
            ]
            matches.append(free[0])
        return matches

    return matches_of


def insertion(question: Question) -> list[Match]:
    """The matches of a sort by binary insertion, a tie going by index."""
    order: list[int] = []
    matches: list[Match] = []
    for player in question.players:
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            match = (min(player, order[middle]), max(player, order[middle]))
            matches.append(match)
            result = mean(question.verdicts, match) * (1 if match[0] == player else -1)
            low, high = (low, middle) if result > 0 else (middle + 1, high)
        order.insert(low, player)
    return matches


# -- pairs ----------------------------------------------------------------------------------------


def top_and_bottom(question: Question, scores: Scores) -> list[Match]:
    """As `--strict_follow_rank`: the i-th best with the i-th of the worst, where scores differ."""
    order = sorted(scores, key=lambda i: (-scores[i], i))
    rank = min(RANK, len(order) // 2)
    pairs = zip(order[:rank], order[len(order) - rank :])
    return [(a, b) for a, b in pairs if scores[a] > scores[b]]


def best_margins(question: Question, scores: Scores) -> list[Match]:
    """Of the top and the bottom, each answer once: where the direct match agrees, widest first."""
    order = sorted(scores, key=lambda i: (-scores[i], i))
    rank = min(RANK, len(order) // 2)
    top, bottom = order[:rank], order[len(order) - rank :]
    pairs: list[Match] = []
    for one in top:
        for other in reversed(bottom):
            if direct(question, one, other) > 0 and all(other not in pair for pair in pairs):
                pairs.append((one, other))
                break
    return pairs


def direct(question: Question, one: int, other: int) -> float:
    """What both orders of the match of these two say."""
    match = (min(one, other), max(one, other))
    return agreed(question.verdicts, match) * (1 if one < other else -1)


def widest(question: Question, scores: Scores) -> list[Match]:
    """As the pipeline pairs: any of the best with any of the worst, the widest margins."""
    order = sorted(scores, key=lambda i: (-scores[i], i))
    rank = min(RANK, len(order) // 2)
    pairs = product(order[:rank], order[len(order) - rank :])
    pairs = sorted(pairs, key=lambda pair: (scores[pair[1]] - scores[pair[0]], pair))
    return [(a, b) for a, b in pairs[:RANK] if scores[a] > scores[b]]


def only_agreed(question: Question, scores: Scores) -> list[Match]:
    return [p for p in top_and_bottom(question, scores) if direct(question, *p) > 0]


def far_apart(question: Question, scores: Scores) -> list[Match]:
    return [(a, b) for a, b in top_and_bottom(question, scores) if scores[a] - scores[b] >= 2]


def not_contradicted(question: Question, scores: Scores) -> list[Match]:
    return [p for p in top_and_bottom(question, scores) if direct(question, *p) >= 0]


# -- the table ------------------------------------------------------------------------------------

Scoring = Callable[[Verdicts, Sequence[int], Sequence[Match], Outcome], Scores]
WAYS: dict[
    str, tuple[Callable[[Question], list[Match]], Scoring, Outcome, Callable[..., list[Match]]]
]
WAYS = {
    "wins - losses, both orders agree": (everyone, wins_minus_losses, agreed, top_and_bottom),
    "wins - losses, mean of both orders": (everyone, wins_minus_losses, mean, top_and_bottom),
    "Bradley-Terry, both orders agree": (everyone, bradley_terry, agreed, top_and_bottom),
    "Bradley-Terry, mean of both orders": (everyone, bradley_terry, mean, top_and_bottom),
    "Bradley-Terry, mean; margin >= 2": (everyone, bradley_terry, mean, far_apart),
    "wins - losses, agree; widest": (everyone, wins_minus_losses, agreed, widest),
    "wins - losses, mean; widest": (everyone, wins_minus_losses, mean, widest),
    "Bradley-Terry, mean; widest": (everyone, bradley_terry, mean, widest),
    "swiss 3 rounds, B-T; widest": (swiss(3), bradley_terry, mean, widest),
    "swiss 4 rounds, B-T; widest": (swiss(4), bradley_terry, mean, widest),
    "ties by opponents, agree": (everyone, with_opponents, agreed, top_and_bottom),
    "ties by opponents, mean": (everyone, with_opponents, mean, top_and_bottom),
    "wins - losses; pairs agreed on": (everyone, wins_minus_losses, agreed, only_agreed),
    "opponents, mean; pairs agreed on": (everyone, with_opponents, mean, only_agreed),
    "opponents, mean; none contradicted": (everyone, with_opponents, mean, not_contradicted),
    "opponents, mean; best agreed pairs": (everyone, with_opponents, mean, best_margins),
    "swiss 4 rounds, wins - losses": (swiss(4), wins_minus_losses, agreed, top_and_bottom),
    "swiss 3 rounds, Bradley-Terry": (swiss(3), bradley_terry, mean, top_and_bottom),
    "swiss 4 rounds, Bradley-Terry": (swiss(4), bradley_terry, mean, top_and_bottom),
    "18 fixed matches, Bradley-Terry": (some(18), bradley_terry, mean, top_and_bottom),
    "18: swiss 2, then the ends, B-T": (ends(2, 18), bradley_terry, mean, top_and_bottom),
    "18: swiss 3, then the ends, B-T": (ends(3, 18), bradley_terry, mean, top_and_bottom),
    "insertion sort, Bradley-Terry": (insertion, bradley_terry, mean, top_and_bottom),
}


def measure(questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Every way on the same verdicts."""
    return {name: measured(questions, *way) for name, way in WAYS.items()}


def measured(
    questions: Sequence[Question],
    schedule: Callable[[Question], list[Match]],
    scoring: Scoring,
    outcome: Outcome,
    pairing: Callable[..., list[Match]],
) -> dict[str, float]:
    """One way; `answers` are the different ones in a question's pairs."""
    right: list[list[float]] = []
    calls, answers = [], []
    for question in questions:
        matches = schedule(question)
        calls.append(2 * len(matches))
        scores = scoring(question.verdicts, question.players, matches, outcome)
        wrong = question.wrong
        pairs = pairing(question, scores)
        answers.append(len({answer for pair in pairs for answer in pair}))
        right.append([
            1.0 if wrong[a] < wrong[b] else 0.5 if wrong[a] == wrong[b] else 0.0
            for a, b in pairs
        ])  # fmt: skip
    low, high = interval(right)
    flat = [one for of_question in right for one in of_question]
    return {
        "calls": round(statistics.mean(calls), 1),
        "pairs": len(flat),
        "answers": round(statistics.mean(answers), 2),
        "right": round(statistics.mean(flat), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def interval(right: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % of the means when questions are drawn again, with all of their pairs."""
    rng = random.Random("interval")
    sums = [(sum(one), len(one)) for one in right]
    means = []
    for _ in range(DRAWS):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / max(1, sum(number for _, number in drawn)))
    means.sort()
    return means[round(0.025 * DRAWS)], means[round(0.975 * DRAWS) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, help="also write the table as JSON here")
    arguments = parser.parse_args()
    tables = {}
    for path in arguments.runs:
        title = f"critic_temperature {temperature_of(RunDir(path)):g}"
        table = tables[title] = measure(list(questions_of(RunDir(path))))
        print(title)
        for name, row in table.items():
            print(f"  {name:38} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(tables, indent=1) + "\n")


def temperature_of(run_dir: RunDir) -> float:
    """What a run's critic drew its replies at."""
    options = read_run_file(run_dir).settings["pipeline_options"]
    return msgspec.convert(options, LlavaCriticOptions, strict=False).critic_temperature


if __name__ == "__main__":
    main()
