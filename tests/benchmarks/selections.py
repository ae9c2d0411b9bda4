"""Ways to choose among a run's pairs by what models find likely, for tests/benchmarks/losses.py.

All but `everything` keep half of the pairs, so that they differ in which pairs are trained on and
not in how many. Log-probs are the run's own: of the instruct model, in nats, and means per token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stream_engine import api
from stream_engine.demo import checkpoint_path
from stream_engine.demo.loop import tensors_of
from stream_engine.demo.tiny_llava import IGNORE, load_checkpoint
from stream_engine.records import Answer, AnswerScore, DatasetPair, SampleRewards, SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results


@dataclass(frozen=True)
class JudgedPair:
    """A pair of a dataset, with what the run knows of its answers."""

    row: DatasetPair
    chosen: float
    """Mean log-prob of the chosen answer's tokens under the instruct model."""
    rejected: float
    margin_per_token: float
    """Of the scores per token where the pipeline has such, else of the scores."""

    @property
    def margin(self) -> float:
        return self.row.margin or 0.0


def judged_pairs(run: Path) -> list[JudgedPair]:
    """All pairs of a finished run's dataset."""
    known = dict(answers_of(RunDir(run)))
    pairs = []
    for row in api.pairs(str(run)):
        (chosen, chosen_score), (rejected, rejected_score) = (
            known[row.idx, text] for text in (row.chosen, row.rejected)
        )
        per_token = per_token_score(chosen_score) - per_token_score(rejected_score)
        pairs.append(JudgedPair(row, mean_logp(chosen), mean_logp(rejected), per_token))
    return pairs


def answers_of(run_dir: RunDir) -> Iterator[tuple[tuple[str, str], tuple[Answer, AnswerScore]]]:
    """Every scored answer by its question's idx and its text."""
    for info in Manifest.load(run_dir).shards:
        idx = dict(zip(info.keys, info.ids))
        rollouts = read_results(run_dir.result("rollouts", info.index), SampleRollouts)
        answers = {(r.key, a.index): a for r in rollouts for a in r.answers}
        for rewards in read_results(run_dir.result("rewards", info.index), SampleRewards):
            for score in rewards.scores:
                answer = answers[rewards.key, score.index]
                yield (idx[rewards.key], answer.text), (answer, score)


def mean_logp(answer: Answer) -> float:
    return sum(answer.scored_logps) / len(answer.scored_logps)


def per_token_score(score: AnswerScore) -> float:
    return score.scores.get("avg", score.score)


Selection = Callable[[Sequence[JudgedPair]], Sequence[JudgedPair]]


def everything(pairs: Sequence[JudgedPair]) -> Sequence[JudgedPair]:
    return pairs


def at_random(pairs: Sequence[JudgedPair]) -> Sequence[JudgedPair]:
    return random.Random("half").sample(pairs, len(pairs) // 2)


def half_with_most(measure: Callable[[JudgedPair], float]) -> Selection:
    """Those of which something is more than of the others."""

    def select(pairs: Sequence[JudgedPair]) -> Sequence[JudgedPair]:
        return sorted(pairs, key=measure, reverse=True)[: len(pairs) // 2]

    return select


def least_displaced(pairs: Sequence[JudgedPair]) -> Sequence[JudgedPair]:
    """The half whose chosen answers are to lose the least, by their length-normalised CHES score.

    <h_chosen, h_rejected> - |h_chosen|^2 of the mean hidden states that predict the answers' tokens
    (Razin et al. 2024, "Unintentional unalignment", definition 2).
    """
    score: list[float] = []
    for start in range(0, len(pairs), 32):
        score += ches([pair.row for pair in pairs[start : start + 32]])
    order = sorted(range(len(pairs)), key=score.__getitem__)
    return [pairs[place] for place in order[: len(pairs) // 2]]


@torch.no_grad()
def ches(rows: Sequence[DatasetPair]) -> list[float]:
    """The score of each pair under the instruct model."""
    model = load_checkpoint(checkpoint_path("instruct")).eval()
    pixels, suffix_ids, labels = tensors_of(model, rows)
    hidden = model.prefill(pixels, suffix_ids)[0][:, :-1]  # [2 pairs, S-1, D]
    is_answer = (labels[:, 1:] != IGNORE)[..., None]
    means = (hidden * is_answer).sum(1) / is_answer.sum(1)
    chosen, rejected = means[0::2], means[1::2]
    return ((chosen * rejected).sum(1) - (chosen * chosen).sum(1)).tolist()


SELECTIONS: dict[str, Selection] = {
    "all": everything,
    "random": at_random,
    "likely": half_with_most(lambda pair: pair.chosen),
    "likelier": half_with_most(lambda pair: pair.chosen - pair.rejected),
    "near": half_with_most(lambda pair: -abs(pair.chosen - pair.rejected)),
    "margin": half_with_most(lambda pair: pair.margin),
    "margin_per_token": half_with_most(lambda pair: pair.margin_per_token),
    "displacement": least_displaced,
}
