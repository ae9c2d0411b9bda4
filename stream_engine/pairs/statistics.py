"""What stats.json says about a dataset: counts, margins, lengths, the judge.

Collected in the merger's two passes, in memory that does not grow with the number of pairs:
counters, and histograms over word counts and over fixed bins of the margin.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stream_engine.pairs.balance import Lengths
from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.run_dir.rankings import AnswerCounts, RankedPair, RankedShard

NUM_MARGIN_BINS = 40


class LengthWins:
    """How often the chosen answer is the longer one: judges favour length."""

    def __init__(self) -> None:
        self.longer = 0
        self.shorter = 0
        self.equal = 0

    def add(self, candidate: Lengths) -> None:
        difference = candidate.chosen_words - candidate.rejected_words
        self.longer += difference > 0
        self.shorter += difference < 0
        self.equal += difference == 0

    def to_dict(self) -> dict[str, Any]:
        """`rate` is longer / (longer + shorter); 0.5 shows no bias."""
        unequal = self.longer + self.shorter
        return {
            "longer": self.longer,
            "shorter": self.shorter,
            "equal": self.equal,
            "rate": rounded(self.longer / unequal) if unequal else None,
        }


class RunStatistics:
    """First pass: every answer of every scored sample, and the pairs before the balance."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.num_samples_with_candidates = 0
        self.num_candidates = 0
        self.num_answers = 0
        self.num_tokens = 0
        self.num_scored = 0
        self.finish_reasons: Counter[str] = Counter()
        self.unscored: Counter[str] = Counter()
        self.num_brought = 0
        self.models: Counter[str] = Counter()
        self.given_pairs: Counter[str] = Counter()
        self.judge: defaultdict[str, float] = defaultdict(float)
        self.length_wins = LengthWins()
        self.least_margin = float("inf")
        self.greatest_margin = float("-inf")

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
        self.finish_reasons.update(counts.finish_reasons)
        self.models.update(counts.models)
        self.given_pairs.update(counts.given_pairs)
        self.unscored.update(counts.unscored)
        for name, values in counts.judge.items():
            for value in values:  # one by one: their sum depends on the order
                self.judge[name] += value

    def add_shard(self, ranked: RankedShard) -> None:
        """Count a shard: its answers, and the pairs that ranking made of them."""
        self.add_counts(ranked.counts)
        self.num_samples_with_candidates += ranked.num_samples_with_candidates
        self.num_candidates += ranked.num_candidates
        for pair in ranked.pairs:
            self.length_wins.add(pair)
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
            "given_pairs": {name: self.given_pairs[name] for name in VERDICTS if self.given_pairs},
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


class PairStatistics:
    """Second pass: the pairs that one format holds."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.num_samples = 0
        self.last_key = ""
        self.dropped: Counter[str] = Counter()
        self.margins = Histogram(0.0, 0.0)
        self.chosen_words: Counter[int] = Counter()
        self.rejected_words: Counter[int] = Counter()
        self.length_wins = LengthWins()
        self.finish_reasons: Counter[str] = Counter()

    def set_margin_bounds(self, least: float, greatest: float) -> None:
        """What the first pass found, before any pair is added."""
        self.margins = Histogram(least, greatest)

    def add_pair(self, pair: RankedPair, key: str) -> None:
        """Count a pair of the sample of that key; those of a sample come one after the other."""
        self.num_pairs += 1
        self.num_samples += key != self.last_key
        self.last_key = key
        self.margins.add(pair.margin)
        self.chosen_words[pair.chosen_words] += 1
        self.rejected_words[pair.rejected_words] += 1
        self.length_wins.add(pair)
        self.finish_reasons[f"chosen_{pair.chosen_finish}"] += 1
        self.finish_reasons[f"rejected_{pair.rejected_finish}"] += 1

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


class Histogram:
    """Counts over equal bins between two known bounds."""

    def __init__(self, least: float, greatest: float) -> None:
        self.least = least
        self.greatest = greatest
        self.counts = [0] * NUM_MARGIN_BINS
        self.total = 0.0
        self.low = float("inf")
        self.high = float("-inf")

    def add(self, value: float) -> None:
        span = self.greatest - self.least
        place = int((value - self.least) / span * len(self.counts)) if span > 0 else 0
        self.counts[min(place, len(self.counts) - 1)] += 1
        self.total += value
        self.low = min(self.low, value)
        self.high = max(self.high, value)

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


def words_summary(counts: Counter[int]) -> dict[str, Any]:
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


def quantile(counts: Counter[int], share: float) -> int:
    """The least value that at least `share` of the counted ones do not exceed."""
    needed = share * sum(counts.values())
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return max(counts)


def rounded(value: float) -> float:
    """Six decimals: what a person reads, and the same on every machine."""
    return round(float(value), 6)
