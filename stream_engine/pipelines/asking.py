"""Ask a model several questions about each sample: one shared prefix a sample, seeded replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stream_engine.errors import RecordError
from stream_engine.records import EncodedImage, Failure, Sample

if TYPE_CHECKING:
    from stream_engine.engine import Engine, GenerateRequest


@dataclass(frozen=True)
class Ask:
    """Questions about one sample, by a name that is theirs alone within the sample.

    A reply's randomness is of (run seed, sample key, name): not of what else is asked with it.
    """

    key: str
    questions: dict[str, str]
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What a model said; `is_cut` when it ran into the length limit."""

    text: str
    is_cut: bool


Replies = dict[str, Reply | RecordError]
"""By the question's name: the reply, or why it could not be asked."""


def ask(
    engine: Engine, asks: Sequence[Ask], *, seed: int
) -> Iterator[tuple[str, Replies | RecordError]]:
    """(key, replies) of every Ask in order of completion; a RecordError where all of one fails.

    The questions of an Ask share one prefix, which is prefilled once.
    """
    from stream_engine.engine import GenerateRequest, RequestFailure, RowRequest, row_seed

    names = {item.key: list(item.questions) for item in asks}
    replies: dict[str, Replies] = {}
    refused: list[tuple[str, RecordError]] = []

    def requests() -> Iterator[GenerateRequest]:
        questions = ((a.key, list(a.questions.values()), a.images) for a in asks)
        for key, shared in engine.prepare_shared(questions):
            if isinstance(shared, RecordError):
                refused.append((key, shared))
                continue
            rows = []
            replies[key] = {}
            for name, suffix in zip(names[key], shared.suffixes):
                if isinstance(suffix, RecordError):
                    replies[key][name] = suffix
                else:
                    rows.append((name, RowRequest(row_seed(seed, f"{key}/{name}", 0), suffix)))
            names[key] = [name for name, _ in rows]
            yield GenerateRequest(key, shared.prompt, tuple(row for _, row in rows))

    for result in engine.generate(requests()):
        if isinstance(result, RequestFailure):
            yield result.key, RecordError(result.reason, result.detail)
            continue
        for name, row in zip(names[result.key], result.rows):
            text = engine.model.decode(row.token_ids)
            replies[result.key][name] = Reply(text, is_cut=row.finish_reason == "length")
        yield result.key, replies.pop(result.key)
    yield from refused


def failure_of(sample: Sample, error: RecordError) -> Failure:
    """The failure that sets a sample aside at the rewards stage."""
    return Failure(
        reason=error.reason,
        detail=error.detail,
        stage="rewards",
        key=sample.key,
        idx=sample.idx,
    )
