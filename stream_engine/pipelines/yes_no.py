"""Whether a VLM says yes or no, read from the probabilities of its first answer token.

    p(yes) = P("yes") + P("Yes")        p(no) = P("no") + P("No")

Which tokens these are is for the checkpoint's tokenizer to say. A word has one token at the start
of a line and another after a space ("yes" and "▁yes" or "Ġyes"); what counts is how the family's
prompt ends: after "ASSISTANT:" an answer begins with a space, after "<|assistant|>\n" with none.
A word of several tokens is watched by its first, unless that begins a word of the other kind too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stream_engine.errors import CheckpointError

if TYPE_CHECKING:
    from stream_engine.models.base import VisionLanguageModel

YES_WORDS = ("yes", "Yes")
NO_WORDS = ("no", "No")


@dataclass(frozen=True)
class YesNo:
    """Probabilities at the first answer token; what is missing to 1 went to other tokens."""

    yes: float
    no: float

    @property
    def holds(self) -> bool:
        """Whether the model affirms; a tie denies."""
        return self.yes > self.no

    @property
    def outside(self) -> float:
        return max(0.0, 1.0 - self.yes - self.no)


@dataclass(frozen=True)
class YesNoTokens:
    """The watched token ids: `yes` for the words of YES_WORDS, then `no`; each at most once."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @property
    def watched(self) -> tuple[int, ...]:
        return self.yes + self.no

    def read(self, logps: Sequence[float]) -> YesNo:
        """From the log-probs of `watched`, in order."""
        probabilities = [math.exp(logp) for logp in logps]
        return YesNo(sum(probabilities[: len(self.yes)]), sum(probabilities[len(self.yes) :]))


def yes_no_of_texts(top_logps: Sequence[tuple[str, float]]) -> YesNo:
    """From the likeliest tokens as a server spells them, with the space before a word or without.

    What is not among them counts as 0.
    """
    yes = no = 0.0
    for token, logp in top_logps:
        word = token.strip(" \n\u2581\u0120")
        yes += math.exp(logp) * (word in YES_WORDS)
        no += math.exp(logp) * (word in NO_WORDS)
    return YesNo(yes, no)


def yes_no_tokens(model: VisionLanguageModel) -> YesNoTokens:
    """The tokens with which this checkpoint says yes and no.

    Raises:
        CheckpointError: when the first tokens do not tell a yes from a no.
    """
    last = model.prompt("Is it so?", []).ids[-1]
    ending = model.tokenizer.decode([last], skip_special_tokens=True)
    after_text = bool(ending) and not ending[-1].isspace()
    yes, no = (
        [_first_token(model, word, after_text=after_text) for word in words]
        for words in (YES_WORDS, NO_WORDS)
    )
    tokens = YesNoTokens(
        yes=tuple(dict.fromkeys(token for token in yes if token not in no)),
        no=tuple(dict.fromkeys(token for token in no if token not in yes)),
    )
    if not (tokens.yes and tokens.no):
        raise CheckpointError(f"{model.checkpoint} begins yes and no with the same tokens")
    return tokens


def _first_token(model: VisionLanguageModel, word: str, *, after_text: bool) -> int:
    if not after_text:
        return model.encode_text(word)[0]
    before, whole = model.encode_text(":"), model.encode_text(f": {word}")
    if whole[: len(before)] != before:
        raise CheckpointError(f"{model.checkpoint}: its tokenizer joins ':' with the next word")
    return whole[len(before)]
