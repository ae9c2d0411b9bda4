"""The difference of two texts: nothing of either is lost, what is shared is the same in both."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_engine.report import difference as module
from stream_engine.report.difference import difference

TEXTS = st.text(alphabet=st.sampled_from("ab .,\n\u202e\u200b漢é"), max_size=40)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_the_segments_put_together_are_the_texts(first: str, second: str) -> None:
    segments = difference(first, second)
    assert tuple("".join(text for _, text in one) for one in segments) == (first, second)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_what_is_shared_is_the_same_in_both_but_for_spaces(first: str, second: str) -> None:
    shared = [
        "".join("".join(text.split()) for own, text in one if not own)
        for one in difference(first, second)
    ]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("limit", [4_000_000, 0])
def test_one_changed_word_is_one_segment(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PRODUCT", limit)
    chosen, rejected = difference("there is a red cross.", "there is a blue cross.")
    assert chosen == [(False, "there is a "), (True, "red"), (False, " cross.")]
    assert rejected == [(False, "there is a "), (True, "blue"), (False, " cross.")]


def test_long_texts_are_compared_at_their_ends_alone() -> None:
    words = ["word " * 5000, "drow " * 5000]
    found = difference(*(f"same {middle}shared {middle}end" for middle in words))
    for segments, middle in zip(found, words):
        own = (True, f"{middle}shared {middle}".rstrip())
        assert segments == [(False, "same "), own, (False, " end")]


def test_equal_texts_share_all() -> None:
    assert difference("a b", "a b") == ([(False, "a b")], [(False, "a b")])
