"""Fused generation and log-probs: one scheduler keeps one large decode batch full.

    waiting requests ──admit──▶ prefix prefilled once ──▶ rows wait ──activate──▶ decode batch
                        ▲                                                            │
                        └──────── rows free their slots, questions their spans ◀─────┘

Admission: vision tower and prefill on batches of questions, under the token budget. A question's
rows then enter the decode batch as slots allow; a finished row makes room for the next, a finished
question frees its prefix. Each sampled token's log-prob under the untempered distribution falls
out of the logits it was sampled from. The random number of a token is a function of its row's seed
and its position only, so the schedule does not shape the answers.

On out-of-memory everything in flight goes back to waiting, the budget halves, and the same answers
are drawn again. The engine knows nothing of pipelines.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from stream_kernels import HostLayout, sample, uniforms
from torch import Tensor

from stream_engine.engine.batching import is_out_of_memory
from stream_engine.engine.decode import (
    STEPS_PER_READ,
    CaptureError,
    DecodeInput,
    decode_eagerly,
)
from stream_engine.engine.prefix_cache import (
    CacheFullError,
    ExtendStep,
    PrefillStep,
    active,
)
from stream_engine.models.base import Prompt

if TYPE_CHECKING:
    from stream_engine.engine.engine import Engine


logger = logging.getLogger(__name__)


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


class Scheduler:
    """One call of generate: its queues and its decode batch."""

    def __init__(self, engine: Engine, requests: Iterable[GenerateRequest]) -> None:
        self.engine = engine
        self.cache = engine.cache
        self.requests = iter(requests)
        self.waiting: deque[GenerateRequest] = deque()
        self.ready: deque[_Row] = deque()
        self.batch: list[_Row] = []
        self.groups: dict[int, _Group] = {}  # by id of the group, in order of admission
        self.results: deque[Generation | RequestFailure] = deque()

    def run(self) -> Iterator[Generation | RequestFailure]:
        """Yield every request's result, in order of completion."""
        self.engine.plan_generation()
        while True:
            try:
                self.admit()
                self.activate()
                if self.batch:
                    self.decode()
                self.engine.budget.succeed()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.retreat(error)
            yield from self.drain()
            if not (self.batch or self.ready or self.peek()):
                return

    # -- admission -----------------------------------------------------------------------------

    def peek(self) -> GenerateRequest | None:
        """The next waiting request, or None when there is none."""
        if not self.waiting:
            following = next(self.requests, None)
            if following is None:
                return None
            self.waiting.append(following)
        return self.waiting[0]

    def admit(self) -> None:
        """Prefill the next questions, while rows are wanted and the budget allows."""
        while len(self.batch) + len(self.ready) < self.engine.budget.rows:
            admitted = self.take_batch()
            if not admitted:
                return
            self.prefill(admitted)

    def take_batch(self) -> list[tuple[GenerateRequest, int]]:
        """Waiting requests for one prefill, each with its span's start."""
        budget = self.engine.budget
        taken: list[tuple[GenerateRequest, int]] = []
        num_tokens = 0
        num_rows = len(self.batch) + len(self.ready)
        while (request := self.peek()) is not None and num_rows < budget.rows:
            length = len(request.prompt)
            refusal = self.engine.refusal(request.prompt, self.longest_suffix(request))
            if refusal is not None:
                self.waiting.popleft()
                self.results.append(RequestFailure(request.key, *refusal))
                continue
            if taken and num_tokens + length > budget.tokens:
                break
            try:
                start = self.cache.allocate_span(length)
            except CacheFullError:
                break
            self.waiting.popleft()
            taken.append((request, start))
            num_tokens += length
            num_rows += len(request.rows)
        return taken

    def longest_suffix(self, request: GenerateRequest) -> int:
        return max((len(row.suffix_ids) for row in request.rows), default=0)

    def prefill(self, admitted: Sequence[tuple[GenerateRequest, int]]) -> None:
        """Run the prompts; when a batch fails, each alone, so that only the bad one is lost."""
        try:
            hidden = self.engine.prefill(
                [request.prompt for request, _ in admitted], [start for _, start in admitted]
            )
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                for request, _ in reversed(admitted):
                    self.waiting.appendleft(request)
                raise
            if len(admitted) > 1:
                for one in admitted:
                    self.prefill([one])
                return
            request, start = admitted[0]
            self.cache.release_span(start, len(request.prompt))
            self.results.append(RequestFailure(request.key, "forward_error", str(error)))
            return
        for (request, start), state in zip(admitted, hidden):
            group = _Group(request, start, state, [], len(request.rows))
            room = self.engine.max_positions - len(request.prompt)
            for row in request.rows:
                limit = min(self.engine.sampling.max_new_tokens, room - len(row.suffix_ids))
                if row.max_new_tokens is not None:
                    limit = min(limit, row.max_new_tokens)
                group.rows.append(_Row(group, row, GeneratedRow(), limit))
            self.groups[id(group)] = group
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
        engine, sampling = self.engine, self.engine.sampling
        logits = engine.logits(hidden)
        rows, logits = self.drop_nonfinite(rows, logits)
        if not rows:
            return
        seeds = torch.tensor([row.request.seed for row in rows], device=logits.device)
        counts = torch.tensor([len(row.result.token_ids) for row in rows], device=logits.device)
        tokens, logps = sample(
            logits,
            uniforms(seeds, counts),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            suppress=engine.suppressed,
            vocab_size=engine.model.vocab_size,
            penalized=penalize(
                logits, [row.result.token_ids for row in rows], sampling.repetition_penalty
            ),
        )
        self.accept(rows, tokens.tolist(), logps.tolist())

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
        return [rows[i] for i in kept], logits[torch.tensor(kept, device=logits.device)]

    def drop_group(self, group: _Group) -> None:
        """Fail a question for which the model computed NaN or infinity."""
        detail = "the model computed NaN or infinity; try --dtype float32"
        self.results.append(RequestFailure(group.request.key, "nonfinite_logits", detail))
        self.cache.release_span(group.start, len(group.request.prompt))
        del self.groups[id(group)]
        for row in group.rows:
            if row.slot is not None:
                self.cache.scrub_slot(row.slot)
                self.cache.release_slot(row.slot)
                row.slot = None
        self.ready = deque(row for row in self.ready if row.group is not group)
        self.batch = [row for row in self.batch if row.group is not group]

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
        self.results.append(Generation(group.request.key, [row.result for row in group.rows]))

    def retreat(self, error: BaseException) -> None:
        """Out of memory: put everything in flight back, free the cache, halve the budget."""
        in_flight = [group.request for group in self.groups.values()]
        if self.engine.budget.is_minimal and len(in_flight) <= 1:
            failed = in_flight or ([self.waiting.popleft()] if self.waiting else [])
            if not failed:
                raise error
            for request in failed:
                self.results.append(RequestFailure(request.key, "out_of_memory", str(error)))
            in_flight = []
        self.groups.clear()
        self.batch = []
        self.ready.clear()
        self.waiting.extendleft(reversed(in_flight))
        self.engine.free_memory()
        self.engine.budget.halve()
        self.engine.plan_generation()

    def drain(self) -> Iterator[Generation | RequestFailure]:
        while self.results:
            yield self.results.popleft()


def penalize(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor | None:
    """Logits [R, V] after a repetition penalty on each row's own tokens; None when it is 1.

    Keskar et al. 2019 (CTRL), as transformers applies it when it is given embeddings: the
    prompt's tokens do not count. Positive logits are divided by the penalty, others multiplied.
    """
    if penalty == 1.0:
        return None
    penalized = logits.clone()
    for row, tokens in enumerate(seen):
        if tokens:
            ids = torch.tensor(sorted(set(tokens)), device=logits.device)
            values = penalized[row, ids]
            penalized[row, ids] = torch.where(values > 0, values / penalty, values * penalty)
    return penalized


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
