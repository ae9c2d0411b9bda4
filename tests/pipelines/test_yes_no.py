"""Which tokens say yes and no, and what their probabilities mean."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models import load_model
from stream_engine.models.base import Prompt
from stream_engine.pipelines.yes_no import YesNo, YesNoTokens, yes_no_tokens
from stream_engine.records import PromptDigest
from tests.models.conftest import GOLDEN

# From each tokenizer's own vocabulary: the token with which an answer of this word begins, where
# words of several tokens stand by their first; those that begin a yes and a no alike are left out.
FAMILIES = [
    pytest.param("llava15/checkpoint", ["▁yes"], ["▁n"], id="llava-after-a-colon"),
    pytest.param("omnilmm/checkpoint", ["y", "Y"], ["n", "N"], id="omnilmm-after-a-newline"),
    pytest.param("minicpmv25", ["y", "Yes"], ["no", "No"], id="minicpm-2.5-after-a-newline"),
    pytest.param("minicpmv26", ["y", "Yes"], ["no", "No"], id="minicpm-2.6-after-a-newline"),
    pytest.param("llava_critic", ["y", "Yes"], ["no", "No"], id="onevision-after-a-newline"),
]


@pytest.mark.parametrize(("folder", "yes", "no"), FAMILIES)
def test_tokens_are_those_at_the_familys_first_answer_position(folder, yes, no):
    model = load_model(GOLDEN / folder, ModelConfig(device="cpu"))
    tokens = yes_no_tokens(model)
    assert model.tokenizer.convert_ids_to_tokens(list(tokens.yes)) == yes
    assert model.tokenizer.convert_ids_to_tokens(list(tokens.no)) == no


class Pieces:
    """A vocabulary of whole words with and without a leading space, as large tokenizers have."""

    def __init__(self, pieces: list[str], ending: str) -> None:
        self.pieces = pieces
        self.checkpoint = "pieces"
        self.ending = ending
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: pieces[ids[0]])

    def prompt(self, question: str, images: list[object]) -> Prompt:
        return Prompt([self.pieces.index(self.ending)], PromptDigest("", "", ""))

    def encode_text(self, text: str) -> list[int]:
        ids = []
        while text:
            longest = max((p for p in self.pieces if p and text.startswith(p)), key=len)
            ids.append(self.pieces.index(longest))
            text = text[len(longest) :]
        return ids


WORDS = ["yes", "Yes", "no", "No"]
VOCABULARY = [*WORDS, *(f" {word}" for word in WORDS), ":", "\n", "", "y", "n"]


@pytest.mark.parametrize(
    ("ending", "pieces"),
    [
        pytest.param(":", [" yes", " Yes", " no", " No"], id="an-answer-after-text-has-a-space"),
        pytest.param("\n", WORDS, id="an-answer-on-a-new-line-has-none"),
        pytest.param("", WORDS, id="an-answer-after-a-special-token-has-none"),
    ],
)
def test_a_leading_space_is_for_the_prompts_end_to_say(ending, pieces):
    tokens = yes_no_tokens(Pieces(VOCABULARY, ending))
    assert [VOCABULARY[token] for token in tokens.watched] == pieces


def test_words_of_several_tokens_stand_by_their_first_unless_it_is_shared():
    pieces = ["e", "s", "y", "Y", "n", "o", "No", ":", "\n", " "]
    tokens = yes_no_tokens(Pieces(pieces, "\n"))
    assert [pieces[token] for token in tokens.watched] == ["y", "Y", "n", "No"]
    with pytest.raises(CheckpointError, match="same tokens"):
        yes_no_tokens(Pieces(pieces, ":"))  # after a colon every word begins with the space


def test_probabilities_of_variants_add_up_and_a_tie_denies():
    tokens = YesNoTokens(yes=(1, 2), no=(3, 4))
    verdict = tokens.read([math.log(p) for p in (0.25, 0.125, 0.25, 0.0625)])
    assert (verdict.yes, verdict.no) == (pytest.approx(0.375), pytest.approx(0.3125))
    assert verdict.outside == pytest.approx(0.3125)
    assert verdict.holds
    assert not YesNo(0.5, 0.5).holds
