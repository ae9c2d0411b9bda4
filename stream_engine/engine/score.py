"""Log-probs of given answers, and of given next tokens, each over one shared prompt prefix.

A question's prompt is prefilled once; the k answers then run as packed suffixes. Only the answers'
positions ever meet the language model's head, and `linear_logp` reduces them without keeping
[tokens, vocabulary] logits. The last token of an answer is predicted but never fed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from stream_kernels import linear_logp
from torch import Tensor

from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.prefix_cache import CacheFullError
from stream_engine.engine.requests import (
    NextTokenLogps,
    RequestFailure,
    ScoredContinuations,
    ScoreRequest,
)
from stream_engine.engine.runner import release_prompts
from stream_engine.models.base import Prompt
from stream_engine.records import FORWARD_ERROR

if TYPE_CHECKING:
    from stream_engine.engine.runner import ModelRunner

ResultT = TypeVar("ResultT")


def score(
    runner: ModelRunner, requests: Iterable[ScoreRequest]
) -> Iterator[ScoredContinuations | RequestFailure]:
    """`log_softmax(logits)[t - 1, token_t]` for each token of each continuation."""

    def read(
        batch: Sequence[ScoreRequest], starts: Sequence[int], first: Tensor
    ) -> list[ScoredContinuations]:
        hidden_parts: list[Tensor] = [first[:0]]
        targets: list[int] = []
        offset = 0
        inputs = [[row[:-1] for row in request.continuations] for request in batch]
        hidden = _run_suffixes(runner, batch, starts, inputs)
        for request, state in zip(batch, first):
            for row in request.continuations:
                hidden_parts += [state[None], hidden[offset : offset + len(row) - 1]]
                targets += row
                offset += len(row) - 1
        logps = target_logps(runner, torch.cat(hidden_parts), targets)
        results = []
        remaining = iter(logps)
        for request in batch:
            rows = [[next(remaining) for _ in row] for row in request.continuations]
            results.append(ScoredContinuations(request.key, rows))
        return results

    yield from _in_batches(runner, requests, read, fed=lambda row: len(row) - 1)


def next_token_logps(
    runner: ModelRunner, requests: Iterable[ScoreRequest], watched: Sequence[int]
) -> Iterator[NextTokenLogps | RequestFailure]:
    """Log-probs of the `watched` token ids right after each continuation of each request."""
    ids = torch.tensor(list(watched), device=runner.model.device)

    def read(
        batch: Sequence[ScoreRequest], starts: Sequence[int], first: Tensor
    ) -> list[NextTokenLogps]:
        rows = [list(request.continuations) for request in batch]
        hidden = _run_suffixes(runner, batch, starts, rows)
        lengths = torch.tensor([len(row) for group in rows for row in group], dtype=torch.int64)
        ends = (lengths.cumsum(0) - 1).to(hidden.device)
        logits = runner.logits(hidden[ends])[:, : runner.model.vocab_size]
        logps = torch.log_softmax(logits, dim=-1)[:, ids].tolist()
        remaining = iter(logps)
        return [
            NextTokenLogps(request.key, [next(remaining) for _ in group])
            for request, group in zip(batch, rows)
        ]

    yield from _in_batches(runner, requests, read, fed=len)


def _in_batches(
    runner: ModelRunner,
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
                refusal = runner.refusal(request.prompt, request.longest)
                if refusal is not None:
                    waiting.popleft()
                    yield RequestFailure(request.key, *refusal)
                    continue
                size = len(request.prompt) + sum(map(fed, request.continuations))
                if batch and num_tokens + size > runner.budget.tokens:
                    break
                try:
                    starts.append(runner.cache.allocate_span(len(request.prompt)))
                except CacheFullError:
                    # What generation has begun early must not keep the first request out.
                    if not batch and runner.drop_early():
                        continue
                    if not batch:
                        raise
                    break
                batch.append(waiting.popleft())
                num_tokens += size
        except BaseException:  # of the requests' source, or of who reads the results
            release_prompts(runner.cache, zip(batch, starts))
            raise
        if not batch:
            return
        yield from _run_batch(runner, batch, starts, read, waiting)


def _run_batch(
    runner: ModelRunner,
    batch: list[ScoreRequest],
    starts: list[int],
    read: Callable[[Sequence[ScoreRequest], Sequence[int], Tensor], list[ResultT]],
    waiting: deque[ScoreRequest],
) -> Iterator[ResultT | RequestFailure]:
    """One batch; when it fails, its requests one by one, so that only the bad one is lost."""
    try:
        first = runner.prefill([request.prompt for request in batch], starts)
        results = read(batch, starts, first)
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        if is_device_lost(error):
            raise
        release_prompts(runner.cache, zip(batch, starts))
        if is_out_of_memory(error):
            if len(batch) == 1 and runner.budget.is_minimal:
                yield RequestFailure(batch[0].key, "out_of_memory", str(error))
            else:
                waiting.extendleft(reversed(batch))
            runner.free_memory()
            runner.budget.halve()
            return
        if len(batch) == 1:
            yield RequestFailure(batch[0].key, FORWARD_ERROR, str(error))
            return
        for request in batch:
            start = runner.cache.allocate_span(len(request.prompt))
            yield from _run_batch(runner, [request], [start], read, waiting)
        return
    release_prompts(runner.cache, zip(batch, starts))
    runner.budget.succeed()
    yield from results


def _run_suffixes(
    runner: ModelRunner,
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
            hidden.append(runner.extend([group for group in groups if group[2]]))
        groups, num_tokens = [], 0

    for request, start, rows in zip(batch, starts, inputs):
        span = (start, len(request.prompt))
        groups.append((request.prompt, span, []))
        for row in rows:
            if num_tokens and num_tokens + len(row) > runner.budget.tokens:
                flush()
                groups.append((request.prompt, span, []))
            if row:
                groups[-1][2].append(row)
                num_tokens += len(row)
    flush()
    size = runner.model.lm_head.weight.shape[1]
    return torch.cat(hidden) if hidden else runner.model.lm_head.weight.new_empty((0, size))


def target_logps(runner: ModelRunner, hidden: Tensor, targets: Sequence[int]) -> list[float]:
    """Log-probs of the targets [N] from hidden states [N, D]."""
    model = runner.model
    runner.counters["head_rows"] += len(targets)
    return linear_logp(
        hidden,
        model.lm_head.weight,
        torch.tensor(list(targets), device=hidden.device),
        bias=model.lm_head.bias,
        vocab_size=model.vocab_size,
        logit_scale=model.logit_scale,
        softcap=model.logit_softcap,
        packed=runner.head_weight,
    ).tolist()
