"""What stats.json says about a dataset: counts, margins, lengths, the judge.

Collected in the merger's two passes, in memory that does not grow with the number of pairs:
counters, and histograms over word counts and over fixed bins of the margin. All can be written down
and gone on with: the same numbers in the same order come to the same, whoever takes a break.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from stream_engine.pairs.balance import Lengths
from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.run_dir.rankings import AnswerCounts, RankedPair, RankedShard

NUM_MARGIN_BINS = 40

K = TypeVar("K", bound=Hashable)


def add_up(total: dict[K, int], more: Iterable[K] | Mapping[K, int]) -> None:
    """Count values, or add counts of them."""
    for value, n in Counter(more).items():
        total[value] = total.get(value, 0) + n


class LengthWins(msgspec.Struct):
    """How often the chosen answer is the longer one: judges favour length."""

    longer: int = 0
    shorter: int = 0
    equal: int = 0

    def add(self, candidate: Lengths) -> None:
        self.add_all([candidate])

    def add_all(self, candidates: Iterable[Lengths]) -> None:
        differences = [one.chosen_words - one.rejected_words for one in candidates]
        longer, equal = sum([one > 0 for one in differences]), differences.count(0)
        self.longer += longer
        self.shorter += len(differences) - longer - equal
        self.equal += equal

    def to_dict(self) -> dict[str, Any]:
        """`rate` is longer / (longer + shorter); 0.5 shows no bias."""
        unequal = self.longer + self.shorter
        return {
            "longer": self.longer,
            "shorter": self.shorter,
            "equal": self.equal,
            "rate": rounded(self.longer / unequal) if unequal else None,
        }


class RunStatistics(msgspec.Struct):
    """First pass: every answer of every scored sample, and the pairs before the balance."""

    num_samples: int = 0
    num_samples_with_candidates: int = 0
    num_candidates: int = 0
    num_answers: int = 0
    num_tokens: int = 0
    num_scored: int = 0
    num_brought: int = 0
    finish_reasons: dict[str, int] = {}
    unscored: dict[str, int] = {}
    models: dict[str, int] = {}
    given_pairs: dict[str, int] = {}
    judge: dict[str, float] = {}
    length_wins: LengthWins = msgspec.field(default_factory=LengthWins)
    least_margin: float = float("inf")
    greatest_margin: float = float("-inf")

    def add_sample(self, rollouts: SampleRollouts, rewards: SampleRewards) -> None:
        """Count the answers and verdicts of one sample."""
        self.add_counts(counts_of([(rollouts, rewards)]))

    def add_counts(self, counts: AnswerCounts) -> None:
        """Count the answers and verdicts of some samples."""
        self.num_samples += counts.num_samples
        self.num_answers += counts.num_answers
        self.num_tokens += counts.num_tokens
        self.num_scored += counts.num_scored
        self.num_brought += counts.num_brought
        add_up(self.finish_reasons, counts.finish_reasons)
        add_up(self.models, counts.models)
        add_up(self.given_pairs, counts.given_pairs)
        add_up(self.unscored, counts.unscored)
        for name, values in counts.judge.items():
            self.judge[name] = added(values, self.judge.get(name, 0.0))

    def add_shard(self, ranked: RankedShard) -> None:
        """Count a shard: its answers, and the pairs that ranking made of them."""
        self.add_counts(ranked.counts)
        self.num_samples_with_candidates += ranked.num_samples_with_candidates
        self.num_candidates += ranked.num_candidates
        self.length_wins.add_all(ranked.pairs)
        margins = [pair.margin for pair in ranked.pairs]
        self.least_margin = min([self.least_margin, *margins])
        self.greatest_margin = max([self.greatest_margin, *margins])

    def to_dict(self, judge_rates: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        """The parts of stats.json that do not depend on the format."""
        rates = {
            name: rounded(self.judge.get(part, 0.0) / self.judge[whole])
            for name, (part, whole) in sorted(judge_rates.items())
            if self.judge.get(whole)
        }
        return {
            "answers": {
                "total": self.num_answers,
                "scored": self.num_scored,
                "unscored": dict(sorted(self.unscored.items())),
                "finish_reasons": dict(sorted(self.finish_reasons.items())),
                "mean_tokens": rounded(self.num_tokens / max(1, self.num_answers)),
                "ids_from_text": self.num_brought,
                "models": dict(sorted(self.models.items())),
            },
            "given_pairs": {
                name: self.given_pairs.get(name, 0) for name in VERDICTS if self.given_pairs
            },
            "judge": {
                "counts": {name: rounded(n) for name, n in sorted(self.judge.items())},
                "rates": rates,
            },
            "length_wins_before_balance": self.length_wins.to_dict(),
        }


def counts_of(samples: Iterable[tuple[SampleRollouts, SampleRewards]]) -> AnswerCounts:
    """The counts of some samples' answers and verdicts."""
    counts = AnswerCounts()
    finish_reasons: Counter[str] = Counter()
    models: Counter[str] = Counter()
    given_pairs: Counter[str] = Counter()
    unscored: Counter[str] = Counter()
    judge: defaultdict[str, list[float]] = defaultdict(list)
    for rollouts, rewards in samples:
        answers = rollouts.answers
        counts.num_samples += 1
        counts.num_answers += len(answers)
        counts.num_tokens += sum([len(answer.token_ids) for answer in answers])
        counts.num_scored += len(rewards.scores)
        counts.num_brought += sum([answer.ids_from_text for answer in answers])
        finish_reasons.update([answer.finish_reason for answer in answers])
        models.update([answer.model for answer in answers if answer.model])
        given_pairs.update(verdicts_on_given(rollouts, rewards))
        for reason, indices in rewards.unscored.items():
            unscored[reason] += len(indices)
        for name, value in rewards.judge.items():
            judge[name].append(value)
    counts.finish_reasons, counts.models = dict(finish_reasons), dict(models)
    counts.given_pairs, counts.unscored = dict(given_pairs), dict(unscored)
    counts.judge = dict(judge)
    return counts


VERDICTS = ("agreed", "reversed", "tied", "unscored")
"""What a scorer says of the order in which the input gave a pair."""


def verdicts_on_given(rollouts: SampleRollouts, rewards: SampleRewards) -> Iterator[str]:
    """One of VERDICTS for each pair that the input had made, whatever becomes of it."""
    scores = {score.index: score.score for score in rewards.scores}
    chosen, rejected = (
        [scores.get(answer.index) for answer in rollouts.answers if answer.given_as == side]
        for side in ("chosen", "rejected")
    )
    for better in chosen:
        for worse in rejected:
            if better is None or worse is None:
                yield "unscored"
            else:
                yield "tied" if better == worse else "agreed" if better > worse else "reversed"


class Histogram(msgspec.Struct):
    """Counts over equal bins between two known bounds."""

    least: float
    greatest: float
    counts: list[int] = msgspec.field(default_factory=lambda: [0] * NUM_MARGIN_BINS)
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, value: float) -> None:
        self.add_all([value])

    def add_all(self, values: Sequence[float]) -> None:
        num_bins, least, span = len(self.counts), self.least, self.greatest - self.least
        places = [int((value - least) / span * num_bins) if span > 0 else 0 for value in values]
        for place, n in Counter(places).items():
            self.counts[min(place, num_bins - 1)] += n
        self.total = added(values, self.total)
        self.low = min([self.low, *values])
        self.high = max([self.high, *values])

    def to_dict(self) -> dict[str, Any]:
        num = sum(self.counts)
        if num == 0:
            return {
                "mean": None,
                "min": None,
                "max": None,
                "histogram": {"edges": [], "counts": []},
            }
        step = (self.greatest - self.least) / len(self.counts)
        edges = [rounded(self.least + i * step) for i in range(len(self.counts) + 1)]
        return {
            "mean": rounded(self.total / num),
            "min": rounded(self.low),
            "max": rounded(self.high),
            "histogram": {"edges": edges, "counts": self.counts},
        }


class PairStatistics(msgspec.Struct):
    """Second pass: the pairs that one format holds."""

    margins: Histogram = msgspec.field(default_factory=lambda: Histogram(0.0, 0.0))
    num_pairs: int = 0
    num_samples: int = 0
    last_key: str = ""
    chosen_words: dict[int, int] = {}
    rejected_words: dict[int, int] = {}
    length_wins: LengthWins = msgspec.field(default_factory=LengthWins)
    finish_reasons: dict[str, int] = {}

    def set_margin_bounds(self, least: float, greatest: float) -> None:
        """What the first pass found, before any pair is added."""
        self.margins = Histogram(least, greatest)

    def add_pairs(self, pairs: Sequence[RankedPair], keys: Sequence[str]) -> None:
        """Count pairs of the samples of these keys; those of a sample come one after the other."""
        if not pairs:
            return
        self.num_pairs += len(pairs)
        self.num_samples += sum(map(operator.ne, keys, [self.last_key, *keys[:-1]]))
        self.last_key = keys[-1]
        self.margins.add_all([pair.margin for pair in pairs])
        add_up(self.chosen_words, [pair.chosen_words for pair in pairs])
        add_up(self.rejected_words, [pair.rejected_words for pair in pairs])
        self.length_wins.add_all(pairs)
        for side in ("chosen", "rejected"):
            ends = Counter([getattr(pair, f"{side}_finish") for pair in pairs])
            add_up(self.finish_reasons, {f"{side}_{end}": n for end, n in ends.items()})

    def to_dict(self) -> dict[str, Any]:
        """The parts of stats.json about the pairs of this dataset."""
        chosen, rejected = words_summary(self.chosen_words), words_summary(self.rejected_words)
        return {
            "margin": self.margins.to_dict(),
            "words": {
                "chosen": chosen,
                "rejected": rejected,
                "mean_difference": rounded(chosen["mean"] - rejected["mean"]),
            },
            "length_wins": self.length_wins.to_dict(),
            "pair_finish_reasons": dict(sorted(self.finish_reasons.items())),
        }


def words_summary(counts: Mapping[int, int]) -> dict[str, Any]:
    """Mean, quantiles and maximum of a histogram over word counts."""
    num = sum(counts.values())
    if num == 0:
        return {"mean": 0.0, "median": 0, "p90": 0, "max": 0}
    return {
        "mean": rounded(sum(words * n for words, n in counts.items()) / num),
        "median": quantile(counts, 0.5),
        "p90": quantile(counts, 0.9),
        "max": max(counts),
    }


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The least value that at least `share` of the counted ones do not exceed."""
    needed = share * sum(counts.values())
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return max(counts)


def added(values: Iterable[float], total: float) -> float:
    """The sum, one by one: that of floats depends on the order, and on what `sum` makes of it."""
    return functools.reduce(operator.add, values, total)


def rounded(value: float) -> float:
    """Six decimals: what a person reads, and the same on every machine."""
    return round(float(value), 6)
