"""Log-probs of given answers, and of given next tokens, each over one shared prompt prefix.

A question's prompt is prefilled once; the k answers then run as packed suffixes. Only the answers'
positions ever meet the language model's head, and `linear_logp` reduces them without keeping
[tokens, vocabulary] logits. The last token of an answer is predicted but never fed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from stream_kernels import linear_logp
from torch import Tensor

from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.generate import RequestFailure, release_prompts
from stream_engine.engine.prefix_cache import CacheFullError
from stream_engine.models.base import Prompt
from stream_engine.records import FORWARD_ERROR

if TYPE_CHECKING:
    from stream_engine.engine.engine import Engine

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ScoreRequest:
    """A question and the continuations to look at, each a non-empty list of token ids."""

    key: str
    prompt: Prompt
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ScoredContinuations:
    """Natural-log probabilities of every token of every continuation, float32."""

    key: str
    token_logps: list[list[float]]


@dataclass(frozen=True)
class NextTokenLogps:
    """For every continuation, log-probs of the watched tokens as the token after it."""

    key: str
    logps: list[list[float]]


def score(
    engine: Engine, requests: Iterable[ScoreRequest]
) -> Iterator[ScoredContinuations | RequestFailure]:
    """`log_softmax(logits)[t - 1, token_t]` for each token of each continuation."""

    def read(
        batch: Sequence[ScoreRequest], starts: Sequence[int], first: Tensor
    ) -> list[ScoredContinuations]:
        hidden_parts: list[Tensor] = [first[:0]]
        targets: list[int] = []
        offset = 0
        inputs = [[row[:-1] for row in request.continuations] for request in batch]
        hidden = _run_suffixes(engine, batch, starts, inputs)
        for request, state in zip(batch, first):
            for row in request.continuations:
                hidden_parts += [state[None], hidden[offset : offset + len(row) - 1]]
                targets += row
                offset += len(row) - 1
        logps = target_logps(engine, torch.cat(hidden_parts), targets)
        results = []
        remaining = iter(logps)
        for request in batch:
            rows = [[next(remaining) for _ in row] for row in request.continuations]
            results.append(ScoredContinuations(request.key, rows))
        return results

    yield from _in_batches(engine, requests, read, fed=lambda row: len(row) - 1)


def next_token_logps(
    engine: Engine, requests: Iterable[ScoreRequest], watched: Sequence[int]
) -> Iterator[NextTokenLogps | RequestFailure]:
    """Log-probs of the `watched` token ids right after each continuation of each request."""
    ids = torch.tensor(list(watched), device=engine.model.device)

    def read(
        batch: Sequence[ScoreRequest], starts: Sequence[int], first: Tensor
    ) -> list[NextTokenLogps]:
        rows = [list(request.continuations) for request in batch]
        hidden = _run_suffixes(engine, batch, starts, rows)
        lengths = torch.tensor([len(row) for group in rows for row in group], dtype=torch.int64)
        ends = (lengths.cumsum(0) - 1).to(hidden.device)
        logits = engine.logits(hidden[ends])[:, : engine.model.vocab_size]
        logps = torch.log_softmax(logits, dim=-1)[:, ids].tolist()
        remaining = iter(logps)
        return [
            NextTokenLogps(request.key, [next(remaining) for _ in group])
            for request, group in zip(batch, rows)
        ]

    yield from _in_batches(engine, requests, read, fed=len)


def _in_batches(
    engine: Engine,
    requests: Iterable[ScoreRequest],
    read: Callable[[Sequence[ScoreRequest], Sequence[int], Tensor], list[ResultT]],
    *,
    fed: Callable[[tuple[int, ...]], int],
) -> Iterator[ResultT | RequestFailure]:
    """Cut requests into batches under the budget; prefill, read, free; smaller after OOM."""
    source = iter(requests)
    waiting: deque[ScoreRequest] = deque()
    while True:
        batch: list[ScoreRequest] = []
        starts: list[int] = []
        num_tokens = 0
        try:
            while True:
                if not waiting:
                    following = next(source, None)
                    if following is None:
                        break
                    waiting.append(following)
                request = waiting[0]
                longest = max((len(row) for row in request.continuations), default=0)
                refusal = engine.refusal(request.prompt, longest)
                if refusal is not None:
                    waiting.popleft()
                    yield RequestFailure(request.key, *refusal)
                    continue
                size = len(request.prompt) + sum(map(fed, request.continuations))
                if batch and num_tokens + size > engine.budget.tokens:
                    break
                try:
                    starts.append(engine.cache.allocate_span(len(request.prompt)))
                except CacheFullError:
                    # What generation has begun early must not keep the first request out.
                    if not batch and engine.scheduler.forget():
                        continue
                    if not batch:
                        raise
                    break
                batch.append(waiting.popleft())
                num_tokens += size
        except BaseException:  # of the requests' source, or of who reads the results
            release_prompts(engine.cache, zip(batch, starts))
            raise
        if not batch:
            return
        yield from _run_batch(engine, batch, starts, read, waiting)


def _run_batch(
    engine: Engine,
    batch: list[ScoreRequest],
    starts: list[int],
    read: Callable[[Sequence[ScoreRequest], Sequence[int], Tensor], list[ResultT]],
    waiting: deque[ScoreRequest],
) -> Iterator[ResultT | RequestFailure]:
    """One batch; when it fails, its requests one by one, so that only the bad one is lost."""
    try:
        first = engine.prefill([request.prompt for request in batch], starts)
        results = read(batch, starts, first)
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        if is_device_lost(error):
            raise
        release_prompts(engine.cache, zip(batch, starts))
        if is_out_of_memory(error):
            if len(batch) == 1 and engine.budget.is_minimal:
                yield RequestFailure(batch[0].key, "out_of_memory", str(error))
            else:
                waiting.extendleft(reversed(batch))
            engine.free_memory()
            engine.budget.halve()
            return
        if len(batch) == 1:
            yield RequestFailure(batch[0].key, FORWARD_ERROR, str(error))
            return
        for request in batch:
            start = engine.cache.allocate_span(len(request.prompt))
            yield from _run_batch(engine, [request], [start], read, waiting)
        return
    release_prompts(engine.cache, zip(batch, starts))
    engine.budget.succeed()
    yield from results


def _run_suffixes(
    engine: Engine,
    batch: Sequence[ScoreRequest],
    starts: Sequence[int],
    inputs: Sequence[Sequence[Sequence[int]]],
) -> Tensor:
    """Hidden states [N, D] of all suffix tokens, packed; runs within the token budget."""
    hidden: list[Tensor] = []
    groups: list[tuple[Prompt, tuple[int, int], list[Sequence[int]]]] = []
    num_tokens = 0

    def flush() -> None:
        nonlocal groups, num_tokens
        if num_tokens:
            hidden.append(engine.extend([group for group in groups if group[2]]))
        groups, num_tokens = [], 0

    for request, start, rows in zip(batch, starts, inputs):
        span = (start, len(request.prompt))
        groups.append((request.prompt, span, []))
        for row in rows:
            if num_tokens and num_tokens + len(row) > engine.budget.tokens:
                flush()
                groups.append((request.prompt, span, []))
            if row:
                groups[-1][2].append(row)
                num_tokens += len(row)
    flush()
    size = engine.model.lm_head.weight.shape[1]
    return torch.cat(hidden) if hidden else engine.model.lm_head.weight.new_empty((0, size))


def target_logps(engine: Engine, hidden: Tensor, targets: Sequence[int]) -> list[float]:
    """Log-probs of the targets [N] from hidden states [N, D]."""
    model = engine.model
    engine.counters["head_rows"] += len(targets)
    return linear_logp(
        hidden,
        model.lm_head.weight,
        torch.tensor(list(targets), device=hidden.device),
        bias=model.lm_head.bias,
        vocab_size=model.vocab_size,
        logit_scale=model.logit_scale,
        softcap=model.logit_softcap,
    ).tolist()
