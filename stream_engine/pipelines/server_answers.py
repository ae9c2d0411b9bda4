"""Stage 0 with a sampler on a server: its texts are answers that are brought along.

Each is asked for by a request of its own, with the seed that the answer would have here. Whether a
seed means the same reply is the server's affair: most promise no more than to try.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from stream_engine.errors import RecordError
from stream_engine.pipelines.asking import failure_of
from stream_engine.pipelines.given import score_given_answers, unscored_answers
from stream_engine.records import Failure, GivenAnswer, Sample, SampleRollouts

if TYPE_CHECKING:
    from stream_engine.engine import Engine
    from stream_engine.remote import ServerModel


def answers_of_server(
    sampler: ServerModel,
    instruct: Engine | None,
    samples: Sequence[Sample],
    *,
    sample_k: int,
    seed: int,
) -> Iterator[SampleRollouts | Failure]:
    """Stage 0: the sampler's answers, or those that a sample brings, scored by `instruct`.

    Without an instruct model they have no ids and no log-probs. A sample of which one answer fails
    for good is set aside by that answer's reason.
    """
    failures: list[Failure] = []

    def answered() -> Iterator[Sample]:
        yield from (sample for sample in samples if sample.answers)
        bare = [sample for sample in samples if not sample.answers]
        for outcome in drawn(sampler, bare, sample_k=sample_k, seed=seed):
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                yield outcome

    if instruct is not None:
        yield from score_given_answers(instruct, answered())
    else:
        yield from map(unscored_answers, answered())
    yield from failures


def drawn(
    sampler: ServerModel, samples: Sequence[Sample], *, sample_k: int, seed: int
) -> Iterator[Sample | Failure]:
    """The samples with their answers, as each is complete."""
    from stream_engine.engine import row_seed
    from stream_engine.remote import ChatRequest

    by_key = {sample.key: sample for sample in samples}
    requests = (
        ChatRequest((s.key, str(j)), s.question, s.images, row_seed(seed, s.key, j))
        for s in samples
        for j in range(sample_k)
    )
    answers: dict[str, dict[int, GivenAnswer]] = {key: {} for key in by_key}
    num_left = dict.fromkeys(by_key, sample_k)
    errors: dict[str, RecordError] = {}
    for (key, number), reply in sampler.complete(requests):
        num_left[key] -= 1
        if isinstance(reply, RecordError):
            errors.setdefault(key, reply)
        else:
            answers[key][int(number)] = GivenAnswer(
                text=reply.text.strip(),
                model=sampler.address.name,
                finish_reason="length" if reply.is_cut else "stop",
            )
        if num_left[key]:
            continue
        if key in errors:
            yield failure_of(by_key[key], errors[key], stage="rollouts")
        else:
            given = answers.pop(key)
            in_order = tuple(given[number] for number in range(sample_k))
            yield msgspec.structs.replace(by_key[key], answers=in_order)
