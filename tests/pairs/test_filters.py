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
        pytest.param("un caf\u00e9", "un cafe\u0301", "same_text", id="decomposed"),
        pytest.param("a\u200b c\u00adat\ufeff", "a c\u2060at", "same_text", id="no-width"),
        pytest.param("a\u200b\ncat", "a cat", "same_text", id="no-width-beside-white-space"),
        pytest.param(
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645",
            "same_text",
            id="persian-joiner",
        ),
        pytest.param(
            "\U0001f469\u200d\U0001f467", "\U0001f469\U0001f467", "same_text", id="emoji-joiner"
        ),
        pytest.param("\u2764\ufe0f", "\u2764", "same_text", id="variation-selector"),
        pytest.param(
            "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
            None,
            id="flags-of-two-countries",
        ),
        pytest.param("un caf\u00e9", "un cafe", None, id="another-letter"),
        pytest.param("a cat", "\u200b\u2060 \ufeff", "empty_answer", id="nothing-seen"),
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


def test_rows_that_read_the_same_are_kept_once_with_their_texts_as_they_are() -> None:
    """Answers that differed in what nobody sees made a pair more."""
    pairs = [candidate("un caf\u00e9\u200b", "un chat"), candidate("un cafe\u0301", "un\u00a0chat")]
    kept, dropped = split_candidates(pairs, RankingConfig())
    assert (kept, [reason for _, reason in dropped]) == (pairs[:1], ["identical_row"])
    assert kept[0].chosen.text == "un caf\u00e9\u200b"


def test_the_first_pairs_of_a_sample_are_kept_up_to_the_limit() -> None:
    pairs = [candidate("a cat", f"{i} dogs") for i in range(5)]
    kept, dropped = split_candidates(pairs, RankingConfig(max_pairs_per_sample=2))
    assert kept == pairs[:2]
    assert [reason for _, reason in dropped] == ["max_pairs_per_sample"] * 3


def test_a_dropped_pair_does_not_use_up_the_limit() -> None:
    pairs = [candidate("a cat", "a cat"), candidate("a cat", "a dog")]
    kept, _ = split_candidates(pairs, RankingConfig(max_pairs_per_sample=1))
    assert kept == pairs[1:]
