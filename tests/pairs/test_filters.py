"""Filters: each names its reason, and keeps what it should."""

from __future__ import annotations

import pytest

from stream_engine.config import RankingConfig
from stream_engine.pairs.filters import Candidate, split_candidates
from stream_engine.records import Answer, PreferencePair


def candidate(chosen: str, rejected: str, *, key: str = "k") -> Candidate:
    pair = PreferencePair(key=key, chosen=0, rejected=1, chosen_score=1.0, rejected_score=0.0)

    def answer(index: int, text: str) -> Answer:
        return Answer(
            index=index, text=text, token_ids=[1], token_logps=[-1.0], finish_reason="length"
        )

    return Candidate(pair, answer(0, chosen), answer(1, rejected))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        pytest.param("a cat", "a dog", None, id="good"),
        pytest.param("", "a dog", "empty_answer", id="empty-chosen"),
        pytest.param("a cat", " \n ", "empty_answer", id="blank-rejected"),
        pytest.param("a cat", "a cat", "same_text", id="same-text"),
        pytest.param("a cat", "a\ncat ", "same_text", id="white-space"),
        pytest.param("<image> a cat", "a dog", "image_tag", id="tag-in-chosen"),
        pytest.param("a cat", "a dog <image>", "image_tag", id="tag-in-rejected"),
    ],
)
def test_filter_names_its_reason(chosen: str, rejected: str, reason: str | None) -> None:
    pair = candidate(chosen, rejected)
    kept, dropped = split_candidates([pair], RankingConfig())
    assert (kept, dropped) == (([pair], []) if reason is None else ([], [(pair, reason)]))


def test_pairs_whose_scores_are_close_are_dropped_on_request() -> None:
    pair = candidate("a cat", "a dog")  # scores 1 and 0
    for least, dropped in ((0.0, []), (1.0, []), (1.1, [(pair, "small_margin")])):
        assert split_candidates([pair], RankingConfig(min_margin=least))[1] == dropped


def test_identical_rows_of_a_sample_are_kept_once() -> None:
    pairs = [candidate("a cat", "a dog"), candidate("a cat", "a dog"), candidate("a dog", "a cat")]
    kept, dropped = split_candidates(pairs, RankingConfig())
    assert kept == [pairs[0], pairs[2]]
    assert [reason for _, reason in dropped] == ["identical_row"]


def test_the_first_pairs_of_a_sample_are_kept_up_to_the_limit() -> None:
    pairs = [candidate("a cat", f"{i} dogs") for i in range(5)]
    kept, dropped = split_candidates(pairs, RankingConfig(max_pairs_per_sample=2))
    assert kept == pairs[:2]
    assert [reason for _, reason in dropped] == ["max_pairs_per_sample"] * 3


def test_a_dropped_pair_does_not_use_up_the_limit() -> None:
    pairs = [candidate("a cat", "a cat"), candidate("a cat", "a dog")]
    kept, _ = split_candidates(pairs, RankingConfig(max_pairs_per_sample=1))
    assert kept == pairs[1:]
