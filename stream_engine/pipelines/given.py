"""Answers that the input brought: their texts become ids, which the instruct model scores.

The ids that were sampled, if they were, are not known; those of the text alone stand in for them,
with the end token behind an answer that was not cut off. One prompt is prefilled a question and all
its answers run over it, so that what later stages see is as complete as of sampled answers. One
that does not fit the model behind its question stays a text without ids, and the others are scored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stream_engine.errors import RecordError
from stream_engine.records import (
    Answer,
    EncodedImage,
    Failure,
    GivenAnswer,
    PromptDigest,
    Sample,
    SampleRollouts,
)

if TYPE_CHECKING:
    from stream_engine.engine import Engine, ScoreRequest


def score_given_answers(
    engine: Engine, samples: Iterable[Sample]
) -> Iterator[SampleRollouts | Failure]:
    """Stage 0 of samples that bring their answers; results in no order."""
    from stream_engine.engine.requests import RequestFailure, ScoreRequest, nonfinite_logits

    by_key: dict[str, Sample] = {}
    prompts: dict[str, tuple[PromptDigest, int]] = {}  # digest, number of tokens
    ids: dict[str, Sequence[Sequence[int]]] = {}
    refused: list[Failure] = []
    end = engine.model.end_token_id(engine.stop_token_ids)

    def failure(key: str, reason: str, detail: str) -> Failure:
        idx = by_key[key].idx
        return Failure(reason=reason, detail=detail, stage="rollouts", key=key, idx=idx)

    def questions() -> Iterator[tuple[str, str, Sequence[EncodedImage]]]:
        for sample in samples:  # those of a server come one by one
            by_key[sample.key] = sample
            yield sample.key, sample.question, sample.images

    def requests() -> Iterator[ScoreRequest]:
        for key, prompt in engine.prepare(questions()):
            try:
                if isinstance(prompt, RecordError):
                    raise prompt
                rows = [
                    engine.model.encode_answer(answer.text)
                    + [end] * (answer.finish_reason == "stop")  # not where it was cut off
                    for answer in by_key[key].answers
                ]
                ids[key] = without_too_long(rows, functools.partial(engine.fits, prompt))
            except RecordError as error:
                refused.append(failure(key, error.reason, error.detail))
                continue
            prompts[key] = (prompt.digest, len(prompt))
            yield ScoreRequest(key, prompt, tuple(tuple(row) for row in ids[key] if row))

    for result in engine.score(requests()):
        if isinstance(result, RequestFailure):
            yield failure(result.key, result.reason, result.detail)
        elif not result.is_finite:
            refusal = nonfinite_logits(result.key)
            yield failure(refusal.key, refusal.reason, refusal.detail)
        else:
            sample = by_key[result.key]
            logps = iter(result.token_logps)
            digest, num_tokens = prompts[result.key]
            asked = engine.model.asked(sample.question, len(sample.images))
            yield SampleRollouts(
                key=result.key,
                prompt=digest,
                answers=[
                    answer_of(index, given, row, next(logps) if row else [])
                    for index, (given, row) in enumerate(zip(sample.answers, ids.pop(result.key)))
                ],
                num_prompt_tokens=num_tokens,
                asked="" if asked == sample.question else asked,
            )
    yield from refused


def without_too_long(rows: list[list[int]], fits: Callable[[int], bool]) -> Sequence[Sequence[int]]:
    """The ids of a question's answers, none for those that do not fit the model; all of them where
    fewer than two would be left to compare."""
    left = [row if fits(len(row)) else [] for row in rows]
    return left if sum(map(bool, left)) >= 2 else rows


def unscored_answers(sample: Sample) -> SampleRollouts:
    """Stage 0 of a sample that brings its answers where no model computes their log-probs: these
    are texts alone, without ids."""
    answers = [answer_of(index, given, [], []) for index, given in enumerate(sample.answers)]
    return SampleRollouts(key=sample.key, prompt=PromptDigest("", "", ""), answers=answers)


def answer_of(index: int, given: GivenAnswer, ids: Sequence[int], logps: Sequence[float]) -> Answer:
    """An answer of the input as stage 0 keeps it."""
    has_end = given.finish_reason == "stop" and len(ids) > 0
    num_tokens = len(ids) - has_end
    return Answer(
        index=index,
        text=given.text,
        token_ids=list(ids[:num_tokens]),
        token_logps=list(logps[:num_tokens]),
        finish_reason=given.finish_reason,
        end_token_id=ids[-1] if has_end else None,
        end_logp=logps[-1] if has_end else None,
        model=given.model,
        given_as=given.given_as,
        ids_from_text=True,
    )
