"""Continuous batching: one scheduler keeps one large decode batch full; log-probs come with it.

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

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.decode import Decoder, decode_eagerly
from stream_engine.engine.draw import draw
from stream_engine.engine.in_flight import (
    EarlyWork,
    Group,
    RequestQueue,
    Row,
    begun_group,
    decode_input,
    first_states,
    group_of,
    slot_of,
    suffix_groups,
)
from stream_engine.engine.planner import MemoryPlanner
from stream_engine.engine.prefix_cache import CacheFullError
from stream_engine.engine.requests import (
    GenerateRequest,
    Generation,
    RequestFailure,
    nonfinite_logits,
)
from stream_engine.engine.runner import ModelRunner, release_prompts
from stream_engine.records import FORWARD_ERROR

PREFILL_AHEAD = 3
"""Questions that a prefill may take beyond those whose rows are wanted now."""
EARLY_CALLS = 4
"""Calls for which early work is kept: where a judge shares the engine, its calls come between."""


class Scheduler:
    """An engine's queues and its decode batch, over any number of calls of generate."""

    def __init__(self, runner: ModelRunner, decoder: Decoder, planner: MemoryPlanner) -> None:
        self.runner = runner
        self.decoder = decoder
        self.planner = planner
        self.cache = runner.cache
        self.early = EarlyWork()
        self.queue = RequestQueue((), self.claim)
        self.ahead = RequestQueue((), self.early.has)
        self.ready: deque[Row] = deque()
        self.batch: list[Row] = []
        self.groups: dict[int, Group] = {}  # by id of the group, in order of admission
        self.results: deque[Generation | RequestFailure] = deque()
        self.is_running = False

    def run(
        self, requests: Iterable[GenerateRequest], ahead: Iterable[GenerateRequest] = ()
    ) -> Iterator[Generation | RequestFailure]:
        """Yield every request's result, in order of completion; see the module header for `ahead`.

        `ahead` is first read when all `requests` have been admitted and rows are free.
        """
        assert not self.is_running, "one call at a time"
        self.is_running = True
        self.early.call += 1
        self.queue = RequestQueue(requests, self.claim)
        self.ahead = RequestQueue(ahead, self.early.has)
        is_complete = False
        try:
            self.planner.plan_generation()
            while self.queue.peek() or any(group.is_wanted for group in self.groups.values()):
                shortage: BaseException | None = None
                try:
                    self.admit()
                    self.activate()
                    if self.batch:
                        self.decode()
                    self.runner.budget.succeed()
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
                self.forget(before_call=self.early.call - EARLY_CALLS)
            else:
                self.abandon()

    # -- work for later calls --------------------------------------------------------------------

    def claim(self, request: GenerateRequest) -> bool:
        """Take over what an earlier call has done for a request; False when that is nothing."""
        work = self.early.take(request)
        if isinstance(work, Group):
            work.is_wanted = True
        elif work is not None:
            self.results.append(work)
        return work is not None

    def forget(self, before_call: int | None = None) -> bool:
        """Drop early work of calls before that number, or else all of it that is in flight.

        Returns whether that has freed memory of the cache; what is done already takes none there.
        """
        groups = self.early.drop(before_call)
        for group in groups:
            self.release_group(group)
        return bool(groups)

    def abandon(self) -> None:
        """Drop everything, after a call that did not come to its end."""
        for group in list(self.groups.values()):
            self.release_group(group)
        self.early.clear()
        self.results.clear()

    def release_group(self, group: Group, *, scrub: bool = False) -> None:
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
            self.early.keep(request, result)

    # -- admission -----------------------------------------------------------------------------

    def admit(self) -> None:
        """Prefill the next questions, while rows are wanted and the budget allows.

        Once one question is wanted, some more come along: a prefill of one costs as many launches
        as a prefill of several. Their rows wait.
        """
        most = self.runner.budget.rows + PREFILL_AHEAD * self.runner.rows_per_question
        while len(self.batch) + len(self.ready) < self.runner.budget.rows:
            queue = self.ahead if self.queue.peek() is None else self.queue
            admitted = self.take_batch(queue, most)
            if not admitted:
                return
            self.prefill(admitted, queue)

    def take_batch(self, queue: RequestQueue, most: int) -> list[tuple[GenerateRequest, int]]:
        """Waiting requests for one prefill, with their spans' starts: up to `most` rows in all."""
        budget = self.runner.budget
        taken: list[tuple[GenerateRequest, int]] = []
        num_tokens = 0
        num_rows = len(self.batch) + len(self.ready)
        try:
            while num_rows < most and (request := queue.peek()) is not None:
                length = len(request.prompt)
                refusal = self.runner.refusal(request.prompt, request.longest_suffix)
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

    def prefill(self, admitted: Sequence[tuple[GenerateRequest, int]], queue: RequestQueue) -> None:
        """Run the prompts; when a batch fails, each alone, so that only the bad one is lost."""
        try:
            hidden = self.runner.prefill(
                [request.prompt for request, _ in admitted], [start for _, start in admitted]
            )
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if is_device_lost(error):
                raise
            if is_out_of_memory(error):
                if queue is self.ahead:  # not worth smaller batches for those that are asked for
                    release_prompts(self.cache, admitted)
                    self.ahead = RequestQueue((), self.early.has)
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
            limits = self.runner.max_positions, self.runner.sampling.max_new_tokens
            group = begun_group(request, start, state, *limits, is_wanted=is_wanted)
            self.groups[id(group)] = group
            if not is_wanted:
                self.early.keep(request, group)
            self.ready.extend(group.rows)
            if not group.rows:
                self.finish_group(group)

    # -- activation ----------------------------------------------------------------------------

    def activate(self) -> None:
        """Move ready rows into the decode batch: give each a slot and its first token."""
        budget = self.runner.budget
        while self.ready and len(self.batch) < budget.rows:
            rows: list[Row] = []
            num_tokens = 0
            while self.ready and len(self.batch) + len(rows) < budget.rows:
                num_tokens += len(self.ready[0].request.suffix_ids)
                if rows and num_tokens > budget.tokens:
                    break
                row = self.ready.popleft()
                row.slot = self.cache.allocate_slot()
                rows.append(row)
            self.batch.extend(rows)
            if self.runner.seen is not None:
                self.runner.seen.begin([slot_of(row) for row in rows])
            states = self.extend(rows) if num_tokens else first_states(rows)
            self.take_tokens(rows, states)

    def extend(self, rows: Sequence[Row]) -> Tensor:
        """Run the rows' own prompt tokens into their slots; hidden states [R, D] at their ends."""
        states = first_states(rows)
        own = [i for i, row in enumerate(rows) if row.request.suffix_ids]
        self.cache.reserve_slot_tokens(max(len(rows[i].request.suffix_ids) for i in own))
        groups = suffix_groups([rows[i] for i in own])
        hidden = self.runner.extend(groups, slots=[slot_of(rows[i]) for i in own])
        lengths = torch.tensor([len(rows[i].request.suffix_ids) for i in own])
        ends = (lengths.cumsum(0) - 1).to(hidden.device)
        states[torch.tensor(own, device=hidden.device)] = hidden[ends]
        return states

    # -- decoding ------------------------------------------------------------------------------

    def decode(self) -> None:
        """One token for every row of the batch; several where a CUDA graph feeds itself."""
        rows = self.batch
        left = max(row.limit - len(row.result.token_ids) for row in rows)
        num_steps = min(self.decoder.steps_per_read, left)
        longest = max(row.num_suffix for row in rows)
        self.cache.reserve_slot_tokens(longest + num_steps - 1)
        batch = decode_input(rows)
        capacity = num_steps * self.runner.budget.rows
        self.runner.count(
            decode_tokens=num_steps * len(rows), decode_steps=num_steps, decode_capacity=capacity
        )
        drawn = self.decoder.run_ahead(batch, num_steps)
        for step_tokens, step_logps in drawn or ():
            self.accept(rows, step_tokens, step_logps)
        if drawn is None:
            self.take_tokens(list(rows), decode_eagerly(self.runner, batch))

    def take_tokens(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Sample each row's next token from its hidden state [R, D]; close rows that end."""
        runner = self.runner
        logits = runner.logits(hidden)
        rows, logits = self.drop_nonfinite(rows, logits)
        if not rows:
            return
        seeds = torch.tensor([row.request.seed for row in rows], device=logits.device)
        counts = torch.tensor([len(row.result.token_ids) for row in rows], device=logits.device)
        seen = None
        if runner.seen is not None:  # what a repetition penalty falls on
            last = [row.result.token_ids[-1:] for row in rows]
            seen = runner.seen.after([slot_of(row) for row in rows], last)
        tokens, logps = draw(runner, logits, seeds, counts, seen)
        self.accept(rows, tokens.tolist(), logps.tolist())

    def accept(self, rows: Sequence[Row], tokens: list[int], logps: list[float]) -> None:
        """Note one drawn token a row; close the rows that end with it. Closed rows take none."""
        for row, token, logp in zip(rows, tokens, logps):
            if row.slot is None:
                continue
            result = row.result
            if math.isnan(logp):
                self.drop_group(group_of(row))
            elif token in self.runner.stop_token_ids:
                result.end_token_id, result.end_logp = token, logp
                result.finish_reason = "stop"
                self.finish_row(row)
            else:
                result.token_ids.append(token)
                result.token_logps.append(logp)
                if len(result.token_ids) >= row.limit:
                    self.finish_row(row)
        self.batch = [row for row in self.batch if row.slot is not None]

    def drop_nonfinite(self, rows: Sequence[Row], logits: Tensor) -> tuple[Sequence[Row], Tensor]:
        """Fail the questions of rows whose logits hold NaN or +infinity; the others go on."""
        finite = torch.isfinite(logits.amax(dim=-1))  # amax carries NaN along
        if finite.all():
            return rows, logits
        bad = {id(row.group): group_of(row) for row, ok in zip(rows, finite.tolist()) if not ok}
        for group in bad.values():
            self.drop_group(group)
        kept = [i for i, row in enumerate(rows) if id(row.group) not in bad]
        indices = torch.tensor(kept, dtype=torch.int64, device=logits.device)
        return [rows[i] for i in kept], logits[indices]

    def drop_group(self, group: Group) -> None:
        """Fail a question for which the model computed NaN or infinity."""
        self.release_group(group, scrub=True)
        failure = nonfinite_logits(group.request.key)
        self.deliver(group.request, failure, is_wanted=group.is_wanted)

    # -- endings -------------------------------------------------------------------------------

    def finish_row(self, row: Row) -> None:
        group = group_of(row)
        self.cache.release_slot(slot_of(row))
        row.slot = None
        group.num_open -= 1
        if group.num_open == 0:
            self.finish_group(group)

    def finish_group(self, group: Group) -> None:
        self.release_group(group)
        self.deliver(group.request, group.generation, is_wanted=group.is_wanted)

    def retreat(self, error: BaseException) -> None:
        """Out of memory: put everything in flight back, free the cache, halve the budget."""
        in_flight = [group.request for group in self.groups.values() if group.is_wanted]
        is_alone = len(in_flight) == len(self.groups)
        for group in list(self.groups.values()):  # what was begun early is begun again when asked
            if not group.is_wanted:
                self.early.take(group.request)
        if self.runner.budget.is_minimal and is_alone and len(in_flight) <= 1:
            failed = in_flight or ([self.queue.pop()] if self.queue.waiting else [])
            if not failed:
                raise error
            lost = (RequestFailure(one.key, "out_of_memory", str(error)) for one in failed)
            self.results.extend(lost)
            in_flight = []
        self.groups, self.batch, self.ready = {}, [], deque()
        self.queue.put_back(in_flight)
        self.runner.free_memory()
        self.runner.budget.halve()
        self.planner.plan_generation()

    def drain(self) -> Iterator[Generation | RequestFailure]:
        while self.results:
            yield self.results.popleft()
