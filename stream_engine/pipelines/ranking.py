"""Scored answers of one sample -> candidate preference pairs. Pure functions, no torch.

    rank_by_reward         dpo_reward: answers that are best (worst) by `sum` and by `avg` alike
    rank_by_denied_facts   divide_and_conquer: any two answers at least one denied fact apart
    rank_by_wins           llava_critic: any of the top against any of the bottom; and
                           divide_and_conquer with `fact_pairs ranked`
    rank_as_given          a pair that the input had made: as it stands, or in the scorer's order

Answers are found by their index and samples by their key, never by a position in a list: an
answer without a score takes no part and shifts nothing. Ties are broken by the answer's index,
so the same records give the same pairs. Candidates come best first (largest margin), since a
later filter keeps the first few of each sample.

`compat="rlaifv"` follows the rules of RLAIF-V's data engine where they are well defined; each
function says where that differs. The words are ours in both: RLAIF-V counts those of
nltk.word_tokenize (punctuation too, "don't" as two, a run of Chinese as one), and its 10-grams are
of jieba.cut, where spaces and punctuation are tokens: about five English words long. So `distance`
and the near-duplicate test decide differently near their thresholds.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from stream_engine.records import Answer, AnswerScore, PreferencePair, SampleRewards
from stream_engine.text import as_seen

Compat = Literal["rlaifv"] | None

NGRAM = 10  # words; the n of the near-duplicate test

# Chinese and Japanese are written without spaces: each of their characters counts as a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


MAX_COUNTED = 1024
"""Texts whose words are remembered: those of a few questions, which are asked for several times."""


def words(text: str) -> list[str]:
    """The words of a text as it is seen: runs without white space, or single Chinese or Japanese
    characters."""
    return text.split() if text.isascii() else WORD.findall(as_seen(text))


@functools.lru_cache(maxsize=MAX_COUNTED)
def count_words(text: str) -> int:
    """`len(words(text))`."""
    return len(words(text))


Ngrams = frozenset[str]


def ngrams(text: Sequence[str], n: int) -> Ngrams:
    """The distinct runs of n words, each as one string: words have no space of their own.

    A string keeps its hash, which a tuple computes anew from all its words.
    """
    return frozenset([" ".join(text[i : i + n]) for i in range(len(text) - n + 1)])


def similarity(a: Sequence[str], b: Sequence[str], *, n: int | None = None) -> float:
    """Jaccard similarity of two texts' sets of word n-grams, from 0 to 1.

    Without `n` it is min(10, words of the shorter text), so that texts of fewer than 10 words are
    compared too; two texts without any word are equal. With `n` a text shorter than n has no
    n-grams, and is similar to nothing.
    """
    return AnswerTexts({0: list(a), 1: list(b)}).similarity(0, 1, n=n)


class AnswerTexts:
    """The words of one sample's answers by index; each set of n-grams is built once."""

    def __init__(self, words: dict[int, list[str]]) -> None:
        self.words = words
        self.num_words = {index: len(text) for index, text in words.items()}
        self._ngrams: dict[int, dict[int, Ngrams]] = {}

    def ngrams(self, index: int, n: int) -> Ngrams:
        known = self._ngrams.setdefault(n, {})
        if index not in known:
            known[index] = ngrams(self.words[index], n)
        return known[index]

    def similarity(self, a: int, b: int, *, n: int | None) -> float:
        """`similarity` of two answers, by index."""
        if n is None:
            n = min(NGRAM, self.num_words[a], self.num_words[b])
            if n == 0:
                return float(self.num_words[a] == self.num_words[b])
        return jaccard(self.ngrams(a, n), self.ngrams(b, n))

    def is_near(self, index: int, others: Iterable[int], threshold: float, n: int | None) -> bool:
        """Whether the similarity of an answer to one of the others exceeds the threshold."""
        if n is not None or self.num_words[index] < NGRAM or threshold < 0:
            return any(self.similarity(index, other, n=n) > threshold for other in others)
        mine, known = self.ngrams(index, NGRAM), self._ngrams[NGRAM]
        for other in others:
            if self.num_words[other] < NGRAM:
                if self.similarity(index, other, n=None) > threshold:
                    return True
                continue
            theirs = known[other] if other in known else self.ngrams(other, NGRAM)
            if not mine.isdisjoint(theirs) and jaccard(mine, theirs) > threshold:
                return True
        return False


def jaccard(a: Ngrams, b: Ngrams) -> float:
    """What two sets have in common, as a share of all that is in either; 0 for two empty ones."""
    num_common = len(a & b)
    num_either = len(a) + len(b) - num_common
    return num_common / num_either if num_either else 0.0


def drop_near_duplicates(
    scores: Iterable[AnswerScore], texts: AnswerTexts, *, threshold: float, n: int | None = None
) -> list[AnswerScore]:
    """Keep each answer that is not too similar to one kept before it; the order stays."""
    kept: list[AnswerScore] = []
    for score in scores:
        if not texts.is_near(score.index, [other.index for other in kept], threshold, n):
            kept.append(score)
    return kept


def rank_by_reward(
    answers: Sequence[Answer],
    rewards: SampleRewards,
    *,
    rank: int,
    distance: int,
    strict_follow_rank: bool = False,
    similarity_threshold: float = 0.9,
    compat: Compat = None,
) -> list[PreferencePair]:
    """dpo_reward: pair the answers that both `sum` and `avg` call best with those both call worst.

    Near-duplicates are removed first; the one with the highest `sum` stays. The best are the top
    `rank` of both orders, the worst the bottom `rank` of both. When fewer than 2 * rank answers
    survive, rank is survivors // 2, so that no answer is both. Pairs are the best with the worst,
    the second best with the second worst and so on (`strict_follow_rank`), or any of the best with
    any of the worst whose word counts differ by less than `distance`. The chosen answer's `sum`
    is strictly higher.

    `compat="rlaifv"`: near-duplicates are removed from each order by itself, over 10-grams only
    (answers under 10 words always stay); rank is not lowered; strict pairs go down both lists in
    `sum` order (1st with 8th, 2nd with 9th, ...); pairs come in that order, not by margin; equal
    sums are paired, though never a lower with a higher.
    """
    texts = AnswerTexts({answer.index: words(answer.text) for answer in answers})
    by_sum = sorted(rewards.scores, key=lambda score: (-score.scores["sum"], score.index))
    by_avg = sorted(rewards.scores, key=lambda score: (-score.scores["avg"], score.index))
    if compat == "rlaifv":
        place = {score.index: i for i, score in enumerate(by_sum)}
        by_sum = drop_near_duplicates(by_sum, texts, threshold=similarity_threshold, n=NGRAM)
        by_avg = drop_near_duplicates(by_avg, texts, threshold=similarity_threshold, n=NGRAM)
    else:
        by_sum = drop_near_duplicates(by_sum, texts, threshold=similarity_threshold)
        survivors = {score.index for score in by_sum}
        by_avg = [score for score in by_avg if score.index in survivors]
        rank = min(rank, len(by_sum) // 2)
    if rank == 0:
        return []
    top_by_avg = {score.index for score in by_avg[:rank]}
    bottom_by_avg = {score.index for score in by_avg[-rank:]}
    best = [score for score in by_sum[:rank] if score.index in top_by_avg]
    worst = [score for score in by_sum[-rank:] if score.index in bottom_by_avg]
    if strict_follow_rank:
        matches = list(zip(best, worst if compat == "rlaifv" else reversed(worst)))
    else:
        matches = of_similar_length(best, worst, texts, distance=distance)
    if compat == "rlaifv":
        return [
            _pair(rewards.key, chosen, rejected, component="sum")
            for chosen, rejected in matches
            if place[chosen.index] < place[rejected.index]
        ]
    return _best_first(
        _pair(rewards.key, chosen, rejected, component="sum")
        for chosen, rejected in matches
        if chosen.scores["sum"] > rejected.scores["sum"]
    )


def of_similar_length(
    best: Sequence[AnswerScore], worst: Sequence[AnswerScore], texts: AnswerTexts, *, distance: int
) -> list[tuple[AnswerScore, AnswerScore]]:
    """Any of the best with any of the worst whose word counts differ by less than `distance`."""
    num_words = texts.num_words
    return [
        (chosen, rejected)
        for chosen in best
        for rejected in worst
        if abs(num_words[chosen.index] - num_words[rejected.index]) < distance
    ]


def rank_by_denied_facts(
    rewards: SampleRewards, *, seed: int, num_pairs: int = 2, min_difference: float = 1.0
) -> list[PreferencePair]:
    """divide_and_conquer: draw `num_pairs` of the pairs whose scores are far enough apart.

    A score is -(number of denied facts). The draw depends on (seed, sample key) and on nothing
    else. RLAIF-V's data engine has the same rule with an unseeded draw.
    """
    scores = sorted(rewards.scores, key=lambda score: (-score.score, score.index))
    eligible = [
        _pair(rewards.key, chosen, rejected)
        for i, chosen in enumerate(scores)
        for rejected in scores[i + 1 :]
        if chosen.score - rejected.score >= min_difference
    ]

    def lot(pair: PreferencePair) -> bytes:
        text = f"{seed}/{pair.key}/{pair.chosen}/{pair.rejected}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return _best_first(sorted(eligible, key=lot)[:num_pairs])


def rank_by_wins(
    rewards: SampleRewards,
    *,
    rank: int,
    strict_follow_rank: bool = False,
    compat: Compat = None,
) -> list[PreferencePair]:
    """llava_critic: any of the top `rank` with any of the bottom `rank`, widest margin first.

    `strict_follow_rank` pairs the i-th of the top with the i-th of the bottom only, both running
    from better to worse. With fewer than 2 * rank scored answers, rank is half their number. The
    chosen answer's score is strictly higher; `compat="rlaifv"` is strict, pairs equal scores too,
    and keeps the order of the positions.
    """
    scores = sorted(rewards.scores, key=lambda score: (-score.score, score.index))
    rank = min(rank, len(scores) // 2)
    top, bottom = scores[:rank], scores[len(scores) - rank :]
    is_strict = strict_follow_rank or compat == "rlaifv"
    matches = zip(top, bottom) if is_strict else itertools.product(top, bottom)
    pairs = [_pair(rewards.key, chosen, rejected) for chosen, rejected in matches]
    if compat == "rlaifv":
        return pairs
    return _best_first(pair for pair in pairs if pair.margin > 0)


def is_given_pair(answers: Iterable[Answer]) -> bool:
    """Whether the input had made a pair of these already."""
    return any(answer.given_as for answer in answers)


def rank_as_given(
    answers: Sequence[Answer], rewards: SampleRewards, *, relabel: bool = False
) -> list[PreferencePair]:
    """The pairs that the input had made, each chosen answer with each rejected one, scored.

    Their order is the input's, so that a margin may be negative; with `relabel` the scorer's. An
    answer without a score is in no pair.
    """
    scores = {score.index: score for score in rewards.scores}
    sides = {
        side: [scores[a.index] for a in answers if a.given_as == side and a.index in scores]
        for side in ("chosen", "rejected")
    }
    pairs = []
    for chosen in sides["chosen"]:
        for rejected in sides["rejected"]:
            is_turned = relabel and rejected.score > chosen.score
            better, worse = (rejected, chosen) if is_turned else (chosen, rejected)
            pairs.append(_pair(rewards.key, better, worse))
    return _best_first(pairs)


def _pair(
    key: str, chosen: AnswerScore, rejected: AnswerScore, *, component: str | None = None
) -> PreferencePair:
    return PreferencePair(
        key=key,
        chosen=chosen.index,
        rejected=rejected.index,
        chosen_score=chosen.score if component is None else chosen.scores[component],
        rejected_score=rejected.score if component is None else rejected.scores[component],
    )


def _best_first(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    return sorted(pairs, key=lambda pair: (-pair.margin, pair.chosen, pair.rejected))
