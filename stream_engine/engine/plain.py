"""The fallback for models that cannot share a prefix: transformers' KV cache, copied to all rows.

One question at a time: its prompt runs once through the model's own code into a transformers cache,
the cache is copied to as many rows as there are answers, and they go on together. Answers, seeds
and log-probs are those of the shared path; only the speed differs. The functions stand in for those
of the scheduler and of `score`, with the same requests and results.

Legend: R rows, A longest row, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.draw import draw, seen_in
from stream_engine.engine.requests import (
    GeneratedRow,
    GenerateRequest,
    Generation,
    NextTokenLogps,
    RequestFailure,
    RowRequest,
    ScoredContinuations,
    ScoreRequest,
    nonfinite_logits,
)
from stream_engine.engine.score import target_logps
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.models.native import CAUSAL_LAYERS
from stream_engine.records import FORWARD_ERROR

if TYPE_CHECKING:
    from stream_engine.engine.runner import ModelRunner

RequestT = TypeVar("RequestT", GenerateRequest, ScoreRequest)
ResultT = TypeVar("ResultT")


def plain_generate(
    runner: ModelRunner, requests: Iterable[GenerateRequest]
) -> Iterator[Generation | RequestFailure]:
    """Draw every request's rows; results in order."""

    def run(request: GenerateRequest) -> Generation | RequestFailure:
        prefix = _Prefix(runner, request.prompt)
        rows = [GeneratedRow() for _ in request.rows]
        for members in _same_length(request.rows, runner.budget.rows):
            chosen = [(request.rows[i], rows[i]) for i in members]
            if not _generate(runner, prefix, chosen):
                return nonfinite_logits(request.key)
        return Generation(request.key, rows)

    for request in requests:
        yield _guarded(runner, request, request.longest_suffix, run)


def plain_score(
    runner: ModelRunner, requests: Iterable[ScoreRequest]
) -> Iterator[ScoredContinuations | RequestFailure]:
    """`log_softmax(logits)[t - 1, token_t]` for each token of each continuation."""

    def run(request: ScoreRequest) -> ScoredContinuations:
        prefix = _Prefix(runner, request.prompt)
        token_logps: list[list[float]] = []
        for rows in _chunks(request.continuations, runner.budget.rows):
            states = prefix.row_states([row[:-1] for row in rows])
            token_logps += [
                target_logps(runner, torch.cat([prefix.last[None], state]), row)
                for row, state in zip(rows, states)
            ]
        return ScoredContinuations(request.key, token_logps)

    for request in requests:
        yield _guarded(runner, request, request.longest, run)


def plain_next_token_logps(
    runner: ModelRunner, requests: Iterable[ScoreRequest], watched: Sequence[int]
) -> Iterator[NextTokenLogps | RequestFailure]:
    """Log-probs of the `watched` token ids right after each continuation of each request."""
    ids = torch.tensor(list(watched), device=runner.model.device)

    def run(request: ScoreRequest) -> NextTokenLogps:
        prefix = _Prefix(runner, request.prompt)
        logps: list[list[float]] = []
        for rows in _chunks(request.continuations, runner.budget.rows):
            states = prefix.row_states(rows)
            ends = torch.stack([torch.cat([prefix.last[None], state])[-1] for state in states])
            logits = runner.logits(ends)[:, : runner.model.vocab_size]
            logps += torch.log_softmax(logits, dim=-1)[:, ids].tolist()
        return NextTokenLogps(request.key, logps)

    for request in requests:
        yield _guarded(runner, request, request.longest, run)


def plain_states(runner: ModelRunner, prompt: Prompt, token_ids: Sequence[int]) -> Tensor:
    """Hidden states [1 + tokens, D] at a prompt's end and at the tokens after it."""
    prefix = _Prefix(runner, prompt)
    return torch.cat([prefix.last[None], *prefix.row_states([token_ids])])


class _Prefix:
    """A prompt that has run once: its cache, and the hidden state [D] at its end."""

    def __init__(self, runner: ModelRunner, prompt: Prompt) -> None:
        self.runner, self.prompt = runner, prompt
        model = runner.model
        [features] = model.encode_images([prompt])
        self.cache = DynamicCache(config=_config(model))
        self.last = model.prefill_cached(prompt, features, self.cache)
        runner.counters["prompts"] += 1
        runner.counters["prompt_tokens"] += len(prompt)
        layers = set(getattr(_config(model), "layer_types", None) or ())
        self.is_attention = layers <= CAUSAL_LAYERS

    def copies(self, rows: int) -> Any:
        """The cache, once a row."""
        cache = deepcopy(self.cache)
        _choose(cache, torch.zeros(rows, dtype=torch.int64, device=self.last.device))
        return cache

    def extend(self, cache: Any, ids: Tensor, done: int) -> Tensor:
        """Hidden states [R, A, D] of further tokens [R, A], `done` of which came before.

        Recurrent layers take one token at a time: transformers resumes their state only so.
        """
        model = self.runner.model
        start = self.prompt.next_position + done
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        steps = [ids.shape[1]] if self.is_attention else [1] * ids.shape[1]
        parts = [
            model.extend_cached(model.embed(part), at, cache)
            for part, at in zip(ids.split(steps, dim=1), positions.split(steps, dim=1))
        ]
        return torch.cat(parts, dim=1)

    def row_states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states [len(row), D] of each row's tokens after the prompt."""
        longest = max(map(len, rows))
        if longest == 0:
            return [self.last[None][:0] for _ in rows]
        # Padding stands at the end, where no token of the row sees it.
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        hidden = self.extend(self.copies(len(rows)), ids.to(self.last.device), 0)
        self.runner.counters["suffix_tokens"] += sum(map(len, rows))
        return [states[: len(row)] for states, row in zip(hidden, rows)]


def _generate(
    runner: ModelRunner, prefix: _Prefix, rows: Sequence[tuple[RowRequest, GeneratedRow]]
) -> bool:
    """Draw rows whose own prompt tokens are equally many; False when the model yields NaN."""
    cache = prefix.copies(len(rows))
    device = prefix.last.device
    num_own = len(rows[0][0].suffix_ids)
    if num_own:
        own = torch.tensor([request.suffix_ids for request, _ in rows], device=device)
        hidden = prefix.extend(cache, own, 0)[:, -1]
    else:
        hidden = prefix.last.expand(len(rows), -1)
    room = runner.max_positions - len(prefix.prompt) - num_own
    open_rows, num_drawn = list(rows), 0
    while True:
        logits = runner.logits(hidden)
        if not torch.isfinite(logits.amax(dim=-1)).all():
            return False
        tokens, logps = _draw(runner, logits, open_rows)
        num_drawn += 1
        kept = [
            place
            for place, (row, token, logp) in enumerate(zip(open_rows, tokens, logps))
            if _accept(runner, *row, token, logp, room)
        ]
        if not kept:
            return True
        if len(kept) < len(open_rows):
            _choose(cache, torch.tensor(kept, device=device))
            open_rows = [open_rows[place] for place in kept]
        ids = torch.tensor([[row.token_ids[-1]] for _, row in open_rows], device=device)
        hidden = prefix.extend(cache, ids, num_own + num_drawn - 1)[:, 0]
        runner.counters["decode_tokens"] += len(open_rows)
        runner.counters["decode_steps"] += 1


def _draw(
    runner: ModelRunner, logits: Tensor, rows: Sequence[tuple[RowRequest, GeneratedRow]]
) -> tuple[list[int], list[float]]:
    """One token a row, and its log-prob under the untempered distribution."""
    seeds = torch.tensor([request.seed for request, _ in rows], device=logits.device)
    counts = torch.tensor([len(row.token_ids) for _, row in rows], device=logits.device)
    seen = None
    if runner.sampling.repetition_penalty != 1.0:
        seen = seen_in([row.token_ids for _, row in rows], logits)
    tokens, logps = draw(runner, logits, seeds, counts, seen)
    return tokens.tolist(), logps.tolist()


def _accept(
    runner: ModelRunner, request: RowRequest, row: GeneratedRow, token: int, logp: float, room: int
) -> bool:
    """Note a drawn token; whether the row goes on."""
    if token in runner.stop_token_ids:
        row.end_token_id, row.end_logp, row.finish_reason = token, logp, "stop"
        return False
    row.token_ids.append(token)
    row.token_logps.append(logp)
    limits = (runner.sampling.max_new_tokens, room, request.max_new_tokens or math.inf)
    return len(row.token_ids) < min(limits)


def _guarded(
    runner: ModelRunner, request: RequestT, longest: int, run: Callable[[RequestT], ResultT]
) -> ResultT | RequestFailure:
    """The request's result, or why it fails alone; out of memory goes on with fewer rows."""
    refusal = runner.refusal(request.prompt, longest)
    if refusal is not None:
        return RequestFailure(request.key, *refusal)
    while True:
        try:
            result = run(request)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if is_device_lost(error):
                raise
            if not is_out_of_memory(error):
                return RequestFailure(request.key, FORWARD_ERROR, str(error))
            if runner.budget.rows == 1 and runner.budget.can_halve:
                return RequestFailure(request.key, "out_of_memory", str(error))
            runner.free_memory()
            runner.budget.halve()
        else:
            runner.budget.succeed()
            return result


def _same_length(rows: Sequence[RowRequest], limit: int) -> Iterator[Sequence[int]]:
    """Indices of rows with equally many tokens of their own, at most `limit` at once."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row.suffix_ids), []).append(index)
    for members in by_length.values():
        yield from _chunks(members, limit)


def _chunks(items: Sequence[Any], limit: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), limit):
        yield items[start : start + limit]


def _choose(cache: Any, rows: Tensor) -> None:
    """Let the cache hold these of its rows, in order, some of them perhaps several times.

    `reorder_cache` is the one such operation that layers of every kind have.
    """
    cache.reorder_cache(rows)


def _config(model: VisionLanguageModel) -> Any:
    return model.backbone.config
