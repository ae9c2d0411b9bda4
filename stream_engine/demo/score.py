"""Measure the pairs of a finished demo run against the truth of the world."""

from __future__ import annotations

from collections.abc import Iterable

from stream_engine.demo.facts import count_wrong_facts
from stream_engine.demo.world import scene_of
from stream_engine.records import DatasetPair


def score_pairs(dataset: Iterable[DatasetPair]) -> dict[str, float]:
    """How often the chosen answer is the truer one.

    Keys: `pairs`; `pair_accuracy`, the share of pairs whose chosen answer has fewer wrong facts
    than the rejected one, a draw counting half; `wrong_facts_chosen` and `wrong_facts_rejected`,
    means per pair. Without pairs the last three are 0. The truth is drawn again from each `idx`;
    ConfigError for rows that the demo world did not make.
    """
    pairs, won, wrong_chosen, wrong_rejected = 0, 0.0, 0, 0
    for pair in dataset:
        scene = scene_of(pair.idx)
        chosen = count_wrong_facts(scene, pair.question, pair.chosen)
        rejected = count_wrong_facts(scene, pair.question, pair.rejected)
        pairs += 1
        won += 1.0 if chosen < rejected else 0.5 if chosen == rejected else 0.0
        wrong_chosen += chosen
        wrong_rejected += rejected
    return {
        "pairs": pairs,
        "pair_accuracy": won / max(1, pairs),
        "wrong_facts_chosen": wrong_chosen / max(1, pairs),
        "wrong_facts_rejected": wrong_rejected / max(1, pairs),
    }
