"""What the engine is asked, and what it answers: plain data."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from stream_engine.models.base import Prompt


@dataclass(frozen=True)
class RowRequest:
    """One answer to draw: its random seed, and prompt tokens of its own after the shared prompt.

    `max_new_tokens`, where given, is a limit below the sampling's.
    """

    seed: int
    suffix_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """A question: the prompt all rows share, and the rows."""

    key: str
    prompt: Prompt
    rows: tuple[RowRequest, ...]

    @property
    def longest_suffix(self) -> int:
        """Most tokens that a row has of its own."""
        return max((len(row.suffix_ids) for row in self.rows), default=0)


@dataclass
class GeneratedRow:
    """One drawn answer. `token_logps` are untempered; the end token is kept apart."""

    token_ids: list[int] = field(default_factory=list)
    token_logps: list[float] = field(default_factory=list)
    finish_reason: str = "length"
    end_token_id: int | None = None
    end_logp: float | None = None


@dataclass(frozen=True)
class Generation:
    """All rows of a request, in the request's order."""

    key: str
    rows: list[GeneratedRow]


@dataclass(frozen=True)
class RequestFailure:
    """A request that fails alone, while others go on."""

    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ScoreRequest:
    """A question and the continuations to look at, each a non-empty list of token ids."""

    key: str
    prompt: Prompt
    continuations: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Most tokens of a continuation."""
        return max(map(len, self.continuations), default=0)


@dataclass(frozen=True)
class ScoredContinuations:
    """Natural-log probabilities of every token of every continuation, float32."""

    key: str
    token_logps: list[list[float]]

    @property
    def is_finite(self) -> bool:
        """Whether the model computed neither NaN nor infinity: as a score NaN has no order."""
        return all(math.isfinite(logp) for row in self.token_logps for logp in row)


@dataclass(frozen=True)
class NextTokenLogps:
    """For every continuation, log-probs of the watched tokens as the token after it."""

    key: str
    logps: list[list[float]]


def nonfinite_logits(key: str) -> RequestFailure:
    """The failure of a question for which the model computed NaN or infinity."""
    detail = "the model computed NaN or infinity; try --dtype float32"
    return RequestFailure(key, "nonfinite_logits", detail)


def identity(request: GenerateRequest) -> Hashable:
    """What two requests have in common that draw the same answers."""
    return request.key, request.rows, request.prompt.digest
