"""Stage 0, the same for every pipeline: k sampled answers a question, with their log-probs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stream_engine.records import Answer, Failure, PromptDigest, Sample, SampleRollouts

if TYPE_CHECKING:
    from stream_engine.engine import Engine, GeneratedRow, GenerateRequest
    from stream_engine.models.base import Prompt


def sample_answers(
    engine: Engine,
    samples: Sequence[Sample],
    ahead: Iterable[Sample] = (),
    *,
    sample_k: int,
    seed: int,
) -> Iterator[SampleRollouts | Failure]:
    """Draw `sample_k` answers to every sample; answer j's randomness is of (seed, key, j) alone.

    `ahead` are samples of the next call, begun where there is room; see `Engine.generate`.
    """
    from stream_engine.engine import GenerateRequest, RequestFailure, RowRequest, row_seed
    from stream_engine.errors import RecordError

    by_key = {sample.key: sample for sample in samples}
    prompts: dict[str, tuple[PromptDigest, int]] = {}  # digest, number of tokens
    refused: list[Failure] = []

    def failure(key: str, reason: str, detail: str) -> Failure:
        idx = by_key[key].idx
        return Failure(reason=reason, detail=detail, stage="rollouts", key=key, idx=idx)

    def request(key: str, prompt: Prompt) -> GenerateRequest:
        rows = tuple(RowRequest(row_seed(seed, key, j)) for j in range(sample_k))
        return GenerateRequest(key, prompt, rows)

    def requests() -> Iterator[GenerateRequest]:
        questions = ((s.key, s.question, s.images) for s in samples)
        for key, prompt in engine.prepare(questions):
            if isinstance(prompt, RecordError):
                refused.append(failure(key, prompt.reason, prompt.detail))
            else:
                prompts[key] = (prompt.digest, len(prompt))
                yield request(key, prompt)

    def requests_ahead() -> Iterator[GenerateRequest]:
        questions = ((s.key, s.question, s.images) for s in ahead)
        for key, prompt in engine.prepare(questions):
            if not isinstance(prompt, RecordError):  # refused when its turn comes
                yield request(key, prompt)

    for result in engine.generate(requests(), requests_ahead()):
        if isinstance(result, RequestFailure):
            yield failure(result.key, result.reason, result.detail)
        else:
            answers = [_answer(engine, j, row) for j, row in enumerate(result.rows)]
            digest, num_tokens = prompts[result.key]
            sample = by_key[result.key]
            asked = engine.model.asked(sample.question, len(sample.images))
            yield SampleRollouts(
                key=result.key,
                prompt=digest,
                answers=answers,
                num_prompt_tokens=num_tokens,
                asked="" if asked == sample.question else asked,
            )
    yield from refused


def _answer(engine: Engine, index: int, row: GeneratedRow) -> Answer:
    return Answer(
        index=index,
        text=engine.model.decode(row.token_ids),
        token_ids=row.token_ids,
        token_logps=row.token_logps,
        finish_reason=row.finish_reason,
        end_token_id=row.end_token_id,
        end_logp=row.end_logp,
    )
