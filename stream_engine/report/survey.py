"""What all pairs of a run are like, and which of them a report shows.

One pass over the results ranks and filters every sample's answers, as a merge does, and puts each
candidate pair into a temporary file as a few numbers. A second one over that file balances, counts
and draws. Memory does not grow with the number of pairs.

The draw is by the seed and the order of the run: the same results give the same report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from stream_engine.config import RankingConfig
from stream_engine.pairs.balance import Balances
from stream_engine.pairs.filters import Candidate, split_candidates
from stream_engine.pairs.rankings import rank, scored_answers
from stream_engine.pairs.statistics import Histogram, LengthWins
from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.report.places import KEPT, Draw, PairFile, PairPlace, Place, Shown
from stream_engine.report.run import ReportedRun
from stream_engine.text import reading

NO_CANDIDATE = {
    "one_scored": "fewer than two answers were scored",
    "same_answers": "all answers are the same text",
    "equal_scores": "all answers score the same",
    "no_match": "near duplicates, or lengths too far apart",
}
"""Why no pair was made of a question's answers."""


@dataclass
class Survey:
    """The counts of a run, and what to show of it."""

    num_samples: int = 0
    num_answers: int = 0
    num_candidates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> candidate pairs."""
    no_candidate: Counter[str] = field(default_factory=Counter)
    """Of NO_CANDIDATE -> questions."""
    all_dropped: Counter[str] = field(default_factory=Counter)
    """The reason of the best pair of a question that lost all -> questions."""
    pairs_per_question: Counter[int] = field(default_factory=Counter)
    margins: Histogram = field(default_factory=lambda: Histogram(0.0, 0.0))
    chosen_scores: Histogram = field(default_factory=lambda: Histogram(0.0, 0.0))
    rejected_scores: Histogram = field(default_factory=lambda: Histogram(0.0, 0.0))
    chosen_words: Counter[int] = field(default_factory=Counter)
    rejected_words: Counter[int] = field(default_factory=Counter)
    differences: Counter[int] = field(default_factory=Counter)
    """words(chosen) - words(rejected) -> kept pairs."""
    wins_before: LengthWins = field(default_factory=LengthWins)
    wins_after: LengthWins = field(default_factory=LengthWins)
    judge: Counter[str] = field(default_factory=Counter)
    shown: list[Shown] = field(default_factory=list)
    """In the order of the run."""
    extremes: dict[str, list[Shown]] = field(default_factory=dict)

    @property
    def num_kept(self) -> int:
        return sum(number * count for number, count in self.pairs_per_question.items())


class Bounds:
    """The least and the greatest of the values that were added."""

    def __init__(self) -> None:
        self.least = float("inf")
        self.greatest = float("-inf")

    def add(self, value: float) -> None:
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)

    def histogram(self) -> Histogram:
        is_empty = self.least > self.greatest
        return Histogram(0.0, 0.0) if is_empty else Histogram(self.least, self.greatest)


def survey(run: ReportedRun, *, num_rows: int, seed: int = 0) -> Survey:
    """Look at every pair; `num_rows` of the kept ones are drawn, the extremes come on top."""
    found = Survey()
    draw = Draw(num_rows, seed)
    ranking = run.config.part(RankingConfig)
    balances = Balances(run.pipeline.length_balance, ranking, run.inputs.round_of)
    with PairFile() as file:
        reasons = rank_all(run, found, draw, balances, file)
        for place, pairs in groupby(file, key=lambda pair: pair.place):
            settle(place, pairs, reasons, found, draw, balances)
    with_candidates = sum(found.pairs_per_question.values())
    found.pairs_per_question[0] += found.num_samples - with_candidates
    found.shown = draw.result()
    found.extremes = {name: draw.extremes(name) for name in draw.EXTREMES}
    return found


def rank_all(
    run: ReportedRun, found: Survey, draw: Draw, balances: Balances, file: PairFile
) -> list[str]:
    """First pass: every candidate into the file; returns the reasons by their numbers in it."""
    ranking = run.config.part(RankingConfig)
    numbers = {KEPT: 0}
    margins, scores = Bounds(), Bounds()
    for info in run.shards():
        for number, (rollouts, rewards) in enumerate(scored_answers(run.run_dir, info)):
            place = Place(info.index, number)
            candidates = rank(run.pipeline, rollouts, rewards)
            found.num_samples += 1
            found.num_answers += len(rollouts.answers)
            found.num_candidates += len(candidates)
            found.judge.update(rewards.judge)
            if not candidates:
                why = why_no_candidate(rollouts, rewards)
                found.no_candidate[why] += 1
                draw.offer(Shown(place, None, why))
            kept, dropped = split_candidates(candidates, ranking)
            for candidate in kept:
                balances.of(info.index).count(candidate)
                found.wins_before.add(candidate)
                margins.add(candidate.pair.margin)
                scores.add(candidate.pair.chosen_score)
                scores.add(candidate.pair.rejected_score)
                file.add(as_numbers(place, candidate, 0))
            for candidate, reason in dropped:
                file.add(as_numbers(place, candidate, numbers.setdefault(reason, len(numbers))))
    found.margins = margins.histogram()
    found.chosen_scores, found.rejected_scores = scores.histogram(), scores.histogram()
    return list(numbers)


def settle(
    place: Place,
    pairs: Iterable[PairPlace],
    reasons: list[str],
    found: Survey,
    draw: Draw,
    balances: Balances,
) -> None:
    """Second pass, one sample: what becomes of its candidates."""
    num_kept = 0
    first_reason = ""
    for pair in pairs:
        reason = reasons[pair.reason]
        if reason == KEPT:
            reason = balances.of(place.shard).reason_to_drop(pair) or KEPT
        draw.offer(Shown(place, pair, reason))
        if reason != KEPT:
            found.dropped[reason] += 1
            first_reason = first_reason or reason
            continue
        num_kept += 1
        found.margins.add(pair.margin)
        found.chosen_scores.add(pair.chosen_score)
        found.rejected_scores.add(pair.rejected_score)
        found.chosen_words[pair.chosen_words] += 1
        found.rejected_words[pair.rejected_words] += 1
        found.differences[pair.chosen_words - pair.rejected_words] += 1
        found.wins_after.add(pair)
    found.pairs_per_question[num_kept] += 1
    if not num_kept:
        found.all_dropped[first_reason] += 1


def as_numbers(place: Place, candidate: Candidate, reason: int) -> PairPlace:
    pair = candidate.pair
    return PairPlace(
        *place,
        pair.chosen,
        pair.rejected,
        pair.chosen_score,
        pair.rejected_score,
        candidate.chosen_words,
        candidate.rejected_words,
        reason,
    )


def why_no_candidate(rollouts: SampleRollouts, rewards: SampleRewards) -> str:
    """The reason, of NO_CANDIDATE, why ranking made no pair of these answers."""
    if len(rewards.scores) < 2:
        return "one_scored"
    scored = {score.index for score in rewards.scores}
    if len({reading(answer.text) for answer in rollouts.answers if answer.index in scored}) == 1:
        return "same_answers"
    if len({score.score for score in rewards.scores}) == 1:
        return "equal_scores"
    return "no_match"
