"""Reading a critic's reply."""

from __future__ import annotations

import pytest

from stream_engine.pipelines.verdicts import parse_verdict, parse_verdict_rlaifv

SHARED = [
    pytest.param("[first] It names the colour.", "first", id="mark-first"),
    pytest.param("So: [second]", "second", id="mark-second"),
    pytest.param("The first response is better because ...", "first", id="first"),
    pytest.param("All in all, The second response is better.", "second", id="second"),
    pytest.param("Two responses are equally good.", "equal", id="two-equally"),
    pytest.param("The two responses are equally good", "equal", id="the-two-equally"),
    pytest.param("The two responses are identical.", "equal", id="identical"),
    pytest.param("Both responses are equally good.", "equal", id="both-equally"),
    pytest.param("", None, id="empty"),
    pytest.param("The first response is good. I like it.", None, id="no-verdict"),
    pytest.param("a b c [third]", None, id="babble"),
]


@pytest.mark.parametrize(("reply", "verdict"), SHARED)
def test_every_phrase_of_the_ancestor_is_read(reply, verdict):
    assert parse_verdict(reply) == verdict
    assert parse_verdict_rlaifv(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        pytest.param("Therefore, the first  response is\nbetter.", "first", id="case-and-space"),
        pytest.param("First: x. Second: y. the second response is better", "second", id="lower"),
        pytest.param("I do not think the first response is better.", None, id="negated"),
        pytest.param("It isn't so that the first response is better", None, id="contracted"),
        pytest.param("It is unclear whether the second response is better.", None, id="doubted"),
        pytest.param(
            "The sky is not blue, so the second response is better.", "second", id="other-clause"
        ),
        pytest.param(
            "The first response is better in style. The second response is better in content.",
            None,
            id="contradiction",
        ),
        pytest.param(
            "The first response is better. Again: [first]", "first", id="said-twice-the-same"
        ),
        pytest.param(
            "It is not so that the first response is better. The second response is better.",
            "second",
            id="negated-then-said",
        ),
        pytest.param("The first response is better-looking", "first", id="hyphen"),
        pytest.param("The first responses is betterment", None, id="word-boundary"),
    ],
)
def test_the_grammar_is_strict(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        pytest.param(
            "Neither response is perfect but the first response is better.", "first", id="but"
        ),
        pytest.param(
            "If one prefers detail then the second response is better", "second", id="then"
        ),
        pytest.param(
            "I was not sure at first However the second response is better", "second", id="however"
        ),
        pytest.param("It is other than not the first response is better", None, id="than"),
    ],
)
def test_a_word_that_turns_the_sentence_ends_the_clause(reply, verdict):
    """Only punctuation ended a clause, so a doubt before "but" denied the verdict after it."""
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        pytest.param(
            "[second] In style the first response is better.", "second", id="mark-then-reasoning"
        ),
        pytest.param(
            "Two responses are equally long. The first response is better in style. [second]",
            "second",
            id="reasoning-then-mark",
        ),
        pytest.param(
            "[first] or [second]? The first response is better.", None, id="marks-contradict"
        ),
    ],
)
def test_marks_win_over_sentences(reply, verdict):
    """A mark is the trained verdict; a sentence of the reasoning that followed cancelled it."""
    assert parse_verdict(reply) == verdict


def test_the_ancestors_rule_takes_the_first_phrase_in_its_own_order():
    both = "The second response is better in style. The first response is better in content."
    assert parse_verdict_rlaifv(both) == "first"
    assert parse_verdict_rlaifv("the first response is better") is None  # upper case only
    assert parse_verdict_rlaifv("Two responses are equally bad; [second]") == "second"
