"""Ask a model several questions about each sample: one shared prefix a sample, seeded replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stream_engine.config import Stage
from stream_engine.errors import RecordError
from stream_engine.records import EncodedImage, Failure, Sample

if TYPE_CHECKING:
    from stream_engine.engine import Engine, GenerateRequest
    from stream_engine.remote import ServerModel


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
    """What a model said; `is_cut` when it ran into the length limit.

    `top_logps` are of the likeliest first tokens, where a server was asked for them.
    """

    text: str
    is_cut: bool
    top_logps: tuple[tuple[str, float], ...] | None = None


Replies = dict[str, Reply | RecordError]
"""By the question's name: the reply, or why it could not be asked."""


def ask(
    engine: Engine | ServerModel, asks: Sequence[Ask], *, seed: int
) -> Iterator[tuple[str, Replies | RecordError]]:
    """(key, replies) of every Ask in order of completion; a RecordError where all of one fails.

    The questions of an Ask share one prefix, which is prefilled once. A model on a server is asked
    them one by one.
    """
    from stream_engine.remote import ServerModel

    if isinstance(engine, ServerModel):
        yield from ask_server(engine, asks, seed=seed)
        return
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


def ask_server(
    server: ServerModel, asks: Sequence[Ask], *, seed: int, wants_logps: bool = False
) -> Iterator[tuple[str, Replies | RecordError]]:
    """As `ask`, of a model on a server.

    A question that is too long for it is left out, as it is of models that are here; any other that
    fails for good fails its Ask.
    """
    from stream_engine.engine import row_seed
    from stream_engine.remote import ChatRequest

    requests = (
        ChatRequest(
            (item.key, name),
            question,
            item.images,
            row_seed(seed, f"{item.key}/{name}", 0),
            wants_logps,
        )
        for item in asks
        for name, question in item.questions.items()
    )
    num_left = {item.key: len(item.questions) for item in asks}
    replies: dict[str, Replies] = {item.key: {} for item in asks}
    errors: dict[str, RecordError] = {}
    yield from ((key, {}) for key, number in num_left.items() if not number)
    for (key, name), reply in server.complete(requests):
        num_left[key] -= 1
        if isinstance(reply, RecordError) and reply.reason != "prompt_too_long":
            errors.setdefault(key, reply)
        elif isinstance(reply, RecordError):
            replies[key][name] = reply
        else:
            replies[key][name] = Reply(reply.text, reply.is_cut, reply.top_logps)
        if not num_left[key]:
            yield key, errors[key] if key in errors else replies.pop(key)


def failure_of(sample: Sample, error: RecordError, *, stage: Stage = "rewards") -> Failure:
    """The failure that sets a sample aside at a stage."""
    return Failure(
        reason=error.reason,
        detail=error.detail,
        stage=stage,
        key=sample.key,
        idx=sample.idx,
    )
