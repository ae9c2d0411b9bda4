"""Lists written by text models."""

from __future__ import annotations

import pytest

from stream_engine.pipelines.bullets import parse_bullets, without_last_line


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        pytest.param("### Facts:\n- A cat.\n- A dog.", ["A cat.", "A dog."], id="as-asked"),
        pytest.param("- A cat.\n\n  - A dog.  \n", ["A cat.", "A dog."], id="white-space"),
        pytest.param("* A cat.\n• A dog.\n-\tA cow.", ["A cat.", "A dog.", "A cow."], id="bullets"),
        pytest.param("- - dashed", ["- dashed"], id="only-the-bullet-goes"),
        pytest.param("- It is -5 degrees.", ["It is -5 degrees."], id="dash-inside"),
        pytest.param("### Facts:\n", [], id="empty-list"),
        pytest.param("", [], id="nothing"),
        pytest.param("A cat.", None, id="no-bullet-loses-no-first-letter"),
        pytest.param("- A cat\nwith a hat.", None, id="wrapped-line"),
        pytest.param("Sure!\n- A cat.", None, id="chatter"),
        pytest.param("- A cat.\n-", None, id="empty-bullet"),
        pytest.param("1. A cat.", None, id="numbered"),
    ],
)
def test_only_a_list_of_sentences_is_read(text, sentences):
    assert parse_bullets(text) == sentences


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("**Facts:**\n- A cat.", id="bold-title"),
        pytest.param("- A cat.\n---\n- A dog.", id="rule"),
        pytest.param("- A cat.\n-5 degrees.", id="wrapped-number"),
    ],
)
def test_a_sign_without_a_space_is_no_bullet(text):
    """The facts "*Facts:**" and "--" were read, and made into questions about the picture."""
    assert parse_bullets(text) is None


def test_a_cut_list_keeps_its_whole_lines():
    assert without_last_line("- A cat.\n- A d") == "- A cat."
    assert without_last_line("- A c") == ""
