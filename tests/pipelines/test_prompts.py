"""The prompts are protocol constants: a changed letter is another question to these checkpoints."""

from __future__ import annotations

import hashlib

import pytest

from stream_engine.pipelines import prompts
from tests.demo_training import prompts as trained_on


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        pytest.param(prompts.SPLIT, "563b1d2e5543bb3f", id="split"),
        pytest.param(prompts.REWRITE, "1875d67e35cdc036", id="rewrite"),
        pytest.param(prompts.YES_NO, "52c440b26aeabc5a", id="yes-no"),
        pytest.param(prompts.CRITIC, "b4e725819fdfafe3", id="critic"),
    ],
)
def test_the_words_are_the_published_ones(text, digest):
    """Hashes of the texts in RLAIF-V's sources, taken when they were read."""
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_prompts_are_put_together_as_published():
    assert prompts.split_prompt("What?", "A cat.").endswith(
        "### Question-answer pair:\nQuestion: What?\nAnswer: A cat."
    )
    # each fact ends its line, and the next begins with one: a blank line lies between them
    assert prompts.rewrite_prompt(["A.", "B."]).endswith(
        "### Declarative sentences:\n- A.\n\n- B.\n"
    )
    assert prompts.yes_no_prompt("Is it {so}?") == "Is it {so}? Please answer yes or no."
    assert prompts.critic_prompt("What?", "{0}", "[b]").endswith(
        "Question: [What?]\nThe first response: [{0}]\nThe second response: [[b]]\nASSISTANT:\n"
    )


def test_no_word_of_a_long_answer_is_cut():
    """RLAIF-V kept the first 300 words of the split prompt and dropped the rest silently."""
    answer = " ".join(f"w{i}" for i in range(1000))
    assert prompts.split_prompt("What?", answer).endswith(answer)


def test_the_demo_models_are_trained_on_these_words():
    facts = ["The cat is red.", "There are two shapes."]
    assert trained_on.split_prompt("What?", "A cat.") == prompts.split_prompt("What?", "A cat.")
    assert trained_on.rewrite_prompt(facts) == prompts.rewrite_prompt(facts)
    assert trained_on.YES_NO_PROMPT == prompts.YES_NO
    assert trained_on.CRITIC_PROMPT == prompts.CRITIC
