"""Fused generation and log-probs: one scheduler keeps one large decode batch full.

    waiting requests ──admit──▶ prefix prefilled once ──▶ rows wait ──activate──▶ decode batch
                        ▲                                                            │
                        └──────── rows free their slots, questions their spans ◀─────┘

Admission: vision tower and prefill on batches of questions, under the token budget. A question's
rows then enter the decode batch as slots allow; a finished row makes room for the next, a finished
question frees its prefix. Each sampled token's log-prob under the untempered distribution falls
out of the logits it was sampled from. The random number of a token is a function of its row's seed
and its position only, so the schedule does not shape the answers.

A call may name questions of a later call. They fill the rows that the call's last answers leave
empty, which would otherwise be a third of all steps for a shard of a hundred questions; what has
been drawn for them by the end of the call is kept, and handed over when they are asked for.

On out-of-memory everything in flight goes back to waiting, the budget halves, and the same answers
are drawn again; memory that ran out where requests are made is not the device's, and ends the call.
The engine knows nothing of pipelines.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from stream_kernels import HostLayout
from torch import Tensor

from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.decode import (
    STEPS_PER_READ,
    CaptureError,
    DecodeInput,
    decode_eagerly,
)
from stream_engine.engine.draw import draw
from stream_engine.engine.prefix_cache import (
    CacheFullError,
    ExtendStep,
    KVCache,
    PrefillStep,
    active,
)
from stream_engine.models.base import Prompt
from stream_engine.records import FORWARD_ERROR

if TYPE_CHECKING:
    from stream_engine.engine.engine import Engine
    from stream_engine.engine.score import ScoreRequest


logger = logging.getLogger(__name__)

PREFILL_AHEAD = 3
"""Questions that a prefill may take beyond those whose rows are wanted now."""
EARLY_CALLS = 4
"""Calls for which early work is kept: where a judge shares the engine, its calls come between."""


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


@dataclass
class _Group:
    """A question in flight: its prefix is in the cache."""

    request: GenerateRequest
    start: int
    first_hidden: Tensor  # [D]: hidden state at the prompt's last position
    rows: list[_Row]
    num_open: int
    is_wanted: bool  # by the call that runs; else by a later one


@dataclass
class _Row:
    """A row of the decode batch. `slot` is None until it is active."""

    group: _Group | None
    request: RowRequest
    result: GeneratedRow
    limit: int
    slot: int | None = None

    @property
    def num_suffix(self) -> int:
        """Tokens its slot must hold for the next decode step, the step's own included."""
        return len(self.request.suffix_ids) + len(self.result.token_ids)


class _Queue:
    """Requests that wait for admission, read from their source when they are looked at."""

    def __init__(
        self, source: Iterable[GenerateRequest], is_handled: Callable[[GenerateRequest], bool]
    ) -> None:
        """`is_handled` says of a new request that it need not wait."""
        self.source = iter(source)
        self.source_error: BaseException | None = None
        self.is_handled = is_handled
        self.waiting: deque[GenerateRequest] = deque()

    def peek(self) -> GenerateRequest | None:
        """The next waiting request, or None when there is none.

        What the source raises is kept: no smaller batch mends it, and a generator that has raised
        looks like one that has come to its end.
        """
        while not self.waiting:
            try:
                following = next(self.source, None)
            except (RuntimeError, MemoryError) as error:
                self.source_error = error
                raise
            if following is None:
                return None
            if not self.is_handled(following):
                self.waiting.append(following)
        return self.waiting[0]

    def pop(self) -> GenerateRequest:
        return self.waiting.popleft()

    def put_back(self, requests: Sequence[GenerateRequest]) -> None:
        self.waiting.extendleft(reversed(requests))


@dataclass
class _Early:
    """Work for a later call: in flight, or done. `call` is the number of the call that began it."""

    call: int
    work: _Group | Generation | RequestFailure


def _identity(request: GenerateRequest) -> Hashable:
    """What two requests have in common that draw the same answers."""
    return request.key, request.rows, request.prompt.digest


class Scheduler:
    """An engine's queues and its decode batch, over any number of calls of generate."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = engine.cache
        self.queue = _Queue((), self.claim)
        self.ahead = _Queue((), self.is_early)
        self.ready: deque[_Row] = deque()
        self.batch: list[_Row] = []
        self.groups: dict[int, _Group] = {}  # by id of the group, in order of admission
        self.early: dict[Hashable, _Early] = {}
        self.results: deque[Generation | RequestFailure] = deque()
        self.num_calls = 0
        self.is_running = False

    def run(
        self, requests: Iterable[GenerateRequest], ahead: Iterable[GenerateRequest] = ()
    ) -> Iterator[Generation | RequestFailure]:
        """Yield every request's result, in order of completion; see the module header for `ahead`.

        `ahead` is first read when all `requests` have been admitted and rows are free.
        """
        assert not self.is_running, "one call at a time"
        self.is_running = True
        self.num_calls += 1
        self.queue = _Queue(requests, self.claim)
        self.ahead = _Queue(ahead, self.is_early)
        is_complete = False
        try:
            self.engine.plan_generation()
            while self.queue.peek() or any(group.is_wanted for group in self.groups.values()):
                shortage: BaseException | None = None
                try:
                    self.admit()
                    self.activate()
                    if self.batch:
                        self.decode()
                    self.engine.budget.succeed()
                except (RuntimeError, MemoryError) as error:
                    of_source = error in (self.queue.source_error, self.ahead.source_error)
                    if of_source or not is_out_of_memory(error):
                        raise
                    # Without its traceback, which holds the tensors of the forward that failed.
                    shortage = error.with_traceback(None)
                    shortage.__context__ = None
                if shortage is not None:
                    self.retreat(shortage)
                yield from self.drain()
            yield from self.drain()
            is_complete = True
        finally:
            self.is_running = False
            if is_complete:
                self.forget(before_call=self.num_calls - EARLY_CALLS)
            else:
                self.abandon()

    # -- work for later calls --------------------------------------------------------------------

    def is_early(self, request: GenerateRequest) -> bool:
        return _identity(request) in self.early

    def claim(self, request: GenerateRequest) -> bool:
        """Take over what an earlier call has done for a request; False when that is nothing."""
        early = self.early.pop(_identity(request), None)
        if early is None:
            return False
        if isinstance(early.work, _Group):
            early.work.is_wanted = True
        else:
            self.results.append(early.work)
        return True

    def forget(self, before_call: int | None = None) -> bool:
        """Drop early work of calls before that number, or else all of it that is in flight.

        Returns whether that has freed memory of the cache; what is done already takes none there.
        """
        stale = {
            key: early
            for key, early in self.early.items()
            if (isinstance(early.work, _Group) if before_call is None else early.call < before_call)
        }
        groups = [early.work for early in stale.values() if isinstance(early.work, _Group)]
        for group in groups:
            self.release_group(group)
        for key in stale:
            del self.early[key]
        return bool(groups)

    def abandon(self) -> None:
        """Drop everything, after a call that did not come to its end."""
        for group in list(self.groups.values()):
            self.release_group(group)
        self.early.clear()
        self.results.clear()

    def release_group(self, group: _Group, *, scrub: bool = False) -> None:
        """Free a question's span and its rows' slots, whatever state they are in."""
        self.cache.release_span(group.start, len(group.request.prompt))
        del self.groups[id(group)]
        for row in group.rows:
            if row.slot is not None:
                if scrub:
                    self.cache.scrub_slot(row.slot)
                self.cache.release_slot(row.slot)
                row.slot = None
        self.ready = deque(row for row in self.ready if row.group is not group)
        self.batch = [row for row in self.batch if row.group is not group]

    def deliver(
        self, request: GenerateRequest, result: Generation | RequestFailure, *, is_wanted: bool
    ) -> None:
        """Hand a result to this call, or keep it for the one that will ask."""
        if is_wanted:
            self.results.append(result)
        else:
            begun = self.early.get(_identity(request))
            call = self.num_calls if begun is None else begun.call
            self.early[_identity(request)] = _Early(call, result)

    # -- admission -----------------------------------------------------------------------------

    def admit(self) -> None:
        """Prefill the next questions, while rows are wanted and the budget allows.

        Once one question is wanted, some more come along: a prefill of one costs as many launches
        as a prefill of several. Their rows wait.
        """
        most = self.engine.budget.rows + PREFILL_AHEAD * self.engine.rows_per_question
        while len(self.batch) + len(self.ready) < self.engine.budget.rows:
            queue = self.ahead if self.queue.peek() is None else self.queue
            admitted = self.take_batch(queue, most)
            if not admitted:
                return
            self.prefill(admitted, queue)

    def take_batch(self, queue: _Queue, most: int) -> list[tuple[GenerateRequest, int]]:
        """Waiting requests for one prefill, with their spans' starts: up to `most` rows in all."""
        budget = self.engine.budget
        taken: list[tuple[GenerateRequest, int]] = []
        num_tokens = 0
        num_rows = len(self.batch) + len(self.ready)
        try:
            while num_rows < most and (request := queue.peek()) is not None:
                length = len(request.prompt)
                refusal = self.engine.refusal(request.prompt, self.longest_suffix(request))
                if refusal is not None:
                    failure = RequestFailure(request.key, *refusal)
                    self.deliver(queue.pop(), failure, is_wanted=queue is self.queue)
                    continue
                if taken and num_tokens + length > budget.tokens:
                    break
                try:
                    start = self.cache.allocate_span(length)
                except CacheFullError:
                    break
                taken.append((queue.pop(), start))
                num_tokens += length
                num_rows += len(request.rows)
        except BaseException:  # of the requests' source: nobody else knows of these spans
            release_prompts(self.cache, taken)
            raise
        return taken

    def longest_suffix(self, request: GenerateRequest) -> int:
        return max((len(row.suffix_ids) for row in request.rows), default=0)

    def prefill(self, admitted: Sequence[tuple[GenerateRequest, int]], queue: _Queue) -> None:
        """Run the prompts; when a batch fails, each alone, so that only the bad one is lost."""
        try:
            hidden = self.engine.prefill(
                [request.prompt for request, _ in admitted], [start for _, start in admitted]
            )
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if is_device_lost(error):
                raise
            if is_out_of_memory(error):
                if queue is self.ahead:  # not worth smaller batches for those that are asked for
                    release_prompts(self.cache, admitted)
                    self.ahead = _Queue((), self.is_early)
                    return
                queue.put_back([request for request, _ in admitted])
                raise
            if len(admitted) == 1:
                release_prompts(self.cache, admitted)
                request, _ = admitted[0]
                failure = RequestFailure(request.key, FORWARD_ERROR, str(error))
                self.deliver(request, failure, is_wanted=queue is self.queue)
                return
            hidden = None
        if hidden is None:  # out of the handler, which holds the tensors of the batch that failed
            for place, one in enumerate(admitted):
                try:
                    self.prefill([one], queue)
                except BaseException:
                    queue.put_back([request for request, _ in admitted[place + 1 :]])
                    raise
            return
        for (request, start), state in zip(admitted, hidden):
            is_wanted = queue is self.queue
            group = _Group(request, start, state, [], len(request.rows), is_wanted)
            room = self.engine.max_positions - len(request.prompt)
            for row in request.rows:
                limit = min(self.engine.sampling.max_new_tokens, room - len(row.suffix_ids))
                if row.max_new_tokens is not None:
                    limit = min(limit, row.max_new_tokens)
                group.rows.append(_Row(group, row, GeneratedRow(), limit))
            self.groups[id(group)] = group
            if not is_wanted:
                self.early[_identity(request)] = _Early(self.num_calls, group)
            self.ready.extend(group.rows)
            if not group.rows:
                self.finish_group(group)

    # -- activation ----------------------------------------------------------------------------

    def activate(self) -> None:
        """Move ready rows into the decode batch: give each a slot and its first token."""
        budget = self.engine.budget
        while self.ready and len(self.batch) < budget.rows:
            rows: list[_Row] = []
            num_tokens = 0
            while self.ready and len(self.batch) + len(rows) < budget.rows:
                num_tokens += len(self.ready[0].request.suffix_ids)
                if rows and num_tokens > budget.tokens:
                    break
                row = self.ready.popleft()
                row.slot = self.cache.allocate_slot()
                rows.append(row)
            self.batch.extend(rows)
            if self.engine.seen is not None:
                self.engine.seen.begin([_slot(row) for row in rows])
            states = self.extend(rows) if num_tokens else self.first_states(rows)
            self.take_tokens(rows, states)

    def first_states(self, rows: Sequence[_Row]) -> Tensor:
        """Hidden states [R, D] from which each row's first token is drawn, without own suffixes."""
        return torch.stack([_group(row).first_hidden for row in rows])

    def extend(self, rows: Sequence[_Row]) -> Tensor:
        """Run the rows' own prompt tokens into their slots; hidden states [R, D] at their ends."""
        states = self.first_states(rows)
        own = [i for i, row in enumerate(rows) if row.request.suffix_ids]
        self.cache.reserve_slot_tokens(max(len(rows[i].request.suffix_ids) for i in own))
        groups: list[tuple[Prompt, tuple[int, int], list[Sequence[int]]]] = []
        previous = None
        for i in own:
            group = _group(rows[i])
            if group is not previous:
                span = (group.start, len(group.request.prompt))
                groups.append((group.request.prompt, span, []))
                previous = group
            groups[-1][2].append(rows[i].request.suffix_ids)
        hidden = self.engine.extend(groups, slots=[_slot(rows[i]) for i in own])
        lengths = torch.tensor([len(rows[i].request.suffix_ids) for i in own])
        ends = (lengths.cumsum(0) - 1).to(hidden.device)
        states[torch.tensor(own, device=hidden.device)] = hidden[ends]
        return states

    # -- decoding ------------------------------------------------------------------------------

    def decode(self) -> None:
        """One token for every row of the batch; several where a CUDA graph feeds itself."""
        rows = self.batch
        lengths = [row.num_suffix for row in rows]
        num_steps = 1
        if self.engine.graphs is not None:
            left = max(row.limit - len(row.result.token_ids) for row in rows)
            num_steps = min(STEPS_PER_READ, left)
        self.cache.reserve_slot_tokens(max(lengths) + num_steps - 1)
        batch = DecodeInput(
            tokens=[row.result.token_ids[-1] for row in rows],
            positions=[
                _group(row).request.prompt.next_position + length - 1
                for row, length in zip(rows, lengths)
            ],
            seeds=[row.request.seed for row in rows],
            counts=[len(row.result.token_ids) for row in rows],
            layout=self.layout(lengths),
        )
        self.engine.counters["decode_tokens"] += num_steps * len(rows)
        self.engine.counters["decode_steps"] += num_steps
        self.engine.counters["decode_capacity"] += num_steps * self.engine.budget.rows
        if self.engine.graphs is not None:
            try:
                tokens, logps = self.engine.graphs.run(batch, num_steps)
            except CaptureError as error:
                logger.warning("decode steps run eagerly, which is slower: %s", error)
                self.engine.graphs = None
            else:
                for step_tokens, step_logps in zip(tokens, logps):
                    self.accept(rows, step_tokens, step_logps)
                return
        self.take_tokens(list(rows), decode_eagerly(self.engine, batch))

    def layout(self, lengths: list[int]) -> HostLayout:
        """Where the batch's rows and prefixes lie."""
        members: dict[int, list[int]] = {}
        for index, row in enumerate(self.batch):
            members.setdefault(id(row.group), []).append(index)
        groups = [self.groups[key] for key in members]
        return HostLayout(
            spans=[(group.start, len(group.request.prompt)) for group in groups],
            groups=list(members.values()),
            slots=[_slot(row) for row in self.batch],
            suffix_lengths=lengths,
        )

    def take_tokens(self, rows: Sequence[_Row], hidden: Tensor) -> None:
        """Sample each row's next token from its hidden state [R, D]; close rows that end."""
        engine = self.engine
        logits = engine.logits(hidden)
        rows, logits = self.drop_nonfinite(rows, logits)
        if not rows:
            return
        seeds = torch.tensor([row.request.seed for row in rows], device=logits.device)
        counts = torch.tensor([len(row.result.token_ids) for row in rows], device=logits.device)
        tokens, logps = draw(engine, logits, seeds, counts, self.seen(rows))
        self.accept(rows, tokens.tolist(), logps.tolist())

    def seen(self, rows: Sequence[_Row]) -> Tensor | None:
        """What a repetition penalty falls on, each row's last token noted: bool [R, V]."""
        seen = self.engine.seen
        if seen is None:
            return None
        device = seen.marks.device
        fed = [row for row in rows if row.result.token_ids]
        if fed:
            tokens = torch.tensor([row.result.token_ids[-1] for row in fed], device=device)
            seen.note(torch.tensor([_slot(row) for row in fed], device=device), tokens)
        return seen.of(torch.tensor([_slot(row) for row in rows], device=device))

    def accept(self, rows: Sequence[_Row], tokens: list[int], logps: list[float]) -> None:
        """Note one drawn token a row; close the rows that end with it. Closed rows take none."""
        for row, token, logp in zip(rows, tokens, logps):
            if row.slot is None:
                continue
            result = row.result
            if math.isnan(logp):
                self.drop_group(_group(row))
            elif token in self.engine.stop_token_ids:
                result.end_token_id, result.end_logp = token, logp
                result.finish_reason = "stop"
                self.finish_row(row)
            else:
                result.token_ids.append(token)
                result.token_logps.append(logp)
                if len(result.token_ids) >= row.limit:
                    self.finish_row(row)
        self.batch = [row for row in self.batch if row.slot is not None]

    def drop_nonfinite(self, rows: Sequence[_Row], logits: Tensor) -> tuple[Sequence[_Row], Tensor]:
        """Fail the questions of rows whose logits hold NaN or +infinity; the others go on."""
        finite = torch.isfinite(logits.amax(dim=-1))  # amax carries NaN along
        if finite.all():
            return rows, logits
        bad = {id(row.group): _group(row) for row, ok in zip(rows, finite.tolist()) if not ok}
        for group in bad.values():
            self.drop_group(group)
        kept = [i for i, row in enumerate(rows) if id(row.group) not in bad]
        indices = torch.tensor(kept, dtype=torch.int64, device=logits.device)
        return [rows[i] for i in kept], logits[indices]

    def drop_group(self, group: _Group) -> None:
        """Fail a question for which the model computed NaN or infinity."""
        detail = "the model computed NaN or infinity; try --dtype float32"
        failure = RequestFailure(group.request.key, "nonfinite_logits", detail)
        self.release_group(group, scrub=True)
        self.deliver(group.request, failure, is_wanted=group.is_wanted)

    # -- endings -------------------------------------------------------------------------------

    def finish_row(self, row: _Row) -> None:
        group = _group(row)
        self.cache.release_slot(_slot(row))
        row.slot = None
        group.num_open -= 1
        if group.num_open == 0:
            self.finish_group(group)

    def finish_group(self, group: _Group) -> None:
        self.cache.release_span(group.start, len(group.request.prompt))
        del self.groups[id(group)]
        result = Generation(group.request.key, [row.result for row in group.rows])
        self.deliver(group.request, result, is_wanted=group.is_wanted)

    def retreat(self, error: BaseException) -> None:
        """Out of memory: put everything in flight back, free the cache, halve the budget."""
        in_flight = [group.request for group in self.groups.values() if group.is_wanted]
        is_alone = len(in_flight) == len(self.groups)
        for group in list(self.groups.values()):  # what was begun early is begun again when asked
            if not group.is_wanted:
                del self.early[_identity(group.request)]
        if self.engine.budget.is_minimal and is_alone and len(in_flight) <= 1:
            failed = in_flight or ([self.queue.pop()] if self.queue.waiting else [])
            if not failed:
                raise error
            for request in failed:
                self.results.append(RequestFailure(request.key, "out_of_memory", str(error)))
            in_flight = []
        self.groups.clear()
        self.batch = []
        self.ready.clear()
        self.queue.put_back(in_flight)
        self.engine.free_memory()
        self.engine.budget.halve()
        self.engine.plan_generation()

    def drain(self) -> Iterator[Generation | RequestFailure]:
        while self.results:
            yield self.results.popleft()


def release_prompts(
    cache: KVCache, admitted: Iterable[tuple[GenerateRequest | ScoreRequest, int]]
) -> None:
    """Free the spans of requests' prompts, each given with its span's start."""
    for request, start in admitted:
        cache.release_span(start, len(request.prompt))


def prefill_prompts(engine: Engine, prompts: Sequence[Prompt], starts: Sequence[int]) -> Tensor:
    """Encode the images and prefill the prompts into their spans; last hidden states [P, D]."""
    spans = [(start, len(prompt)) for start, prompt in zip(starts, prompts)]
    features = engine.model.encode_images(prompts)
    with active(PrefillStep(engine.cache, spans)):
        hidden = engine.model.prefill(prompts, features)
    engine.counters["prompts"] += len(prompts)
    engine.counters["prompt_tokens"] += sum(map(len, prompts))
    return hidden


def extend_rows(
    engine: Engine,
    groups: Sequence[tuple[Prompt, tuple[int, int], Sequence[Sequence[int]]]],
    slots: Sequence[int] | None = None,
) -> Tensor:
    """Run rows of own tokens over their prefixes; hidden states [N, D] of all, packed in order.

    `groups` holds (prompt, its span, the rows' tokens); every row has at least one token.
    """
    device = engine.model.device
    step = ExtendStep(
        engine.cache, [(span, [len(row) for row in rows]) for _, span, rows in groups], slots
    )
    ids = torch.tensor([i for _, _, rows in groups for row in rows for i in row], device=device)
    positions = torch.cat(
        [
            torch.arange(prompt.next_position, prompt.next_position + len(row))
            for prompt, _, rows in groups
            for row in rows
        ]
    ).to(device)
    with active(step):
        hidden = engine.model.forward(engine.model.embed(ids), positions)
    engine.counters["suffix_tokens"] += len(ids)
    return hidden


def _group(row: _Row) -> _Group:
    assert row.group is not None
    return row.group


def _slot(row: _Row) -> int:
    assert row.slot is not None
    return row.slot
