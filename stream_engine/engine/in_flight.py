"""Questions and rows in flight, and the requests that wait for them to make room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from stream_kernels import HostLayout
from torch import Tensor

from stream_engine.engine.decode import DecodeInput
from stream_engine.engine.requests import (
    GeneratedRow,
    GenerateRequest,
    Generation,
    RequestFailure,
    RowRequest,
    identity,
)
from stream_engine.models.base import Prompt


@dataclass
class Group:
    """A question in flight: its prefix is in the cache."""

    request: GenerateRequest
    start: int
    first_hidden: Tensor  # [D]: hidden state at the prompt's last position
    rows: list[Row]
    num_open: int
    is_wanted: bool  # by the call that runs; else by a later one

    @property
    def generation(self) -> Generation:
        return Generation(self.request.key, [row.result for row in self.rows])


@dataclass
class Row:
    """A row of the decode batch. `slot` is None until it is active."""

    group: Group | None
    request: RowRequest
    result: GeneratedRow
    limit: int
    slot: int | None = None

    @property
    def num_suffix(self) -> int:
        """Tokens its slot must hold for the next decode step, the step's own included."""
        return len(self.request.suffix_ids) + len(self.result.token_ids)


def begun_group(
    request: GenerateRequest,
    start: int,
    first_hidden: Tensor,
    max_positions: int,
    max_new_tokens: int,
    *,
    is_wanted: bool,
) -> Group:
    """A question whose prompt has run, and its rows, each with the tokens that it may draw."""
    group = Group(request, start, first_hidden, [], len(request.rows), is_wanted)
    room = max_positions - len(request.prompt)
    for row in request.rows:
        limit = min(max_new_tokens, room - len(row.suffix_ids))
        if row.max_new_tokens is not None:
            limit = min(limit, row.max_new_tokens)
        group.rows.append(Row(group, row, GeneratedRow(), limit))
    return group


class RequestQueue:
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


class EarlyWork:
    """What was begun in one call of generate for a later one: questions in flight, and results."""

    def __init__(self) -> None:
        self.call = 0  # the number of the call that runs
        self._works: dict[Hashable, tuple[int, Group | Generation | RequestFailure]] = {}

    def __len__(self) -> int:
        return len(self._works)

    def has(self, request: GenerateRequest) -> bool:
        return identity(request) in self._works

    def take(self, request: GenerateRequest) -> Group | Generation | RequestFailure | None:
        """Hand over what there is for a request; it is kept no longer."""
        return self._works.pop(identity(request), (0, None))[1]

    def keep(self, request: GenerateRequest, work: Group | Generation | RequestFailure) -> None:
        """Keep what was begun, or the result in its place, under the call that began it."""
        begun, _ = self._works.get(identity(request), (self.call, None))
        self._works[identity(request)] = begun, work

    def drop(self, before_call: int | None = None) -> list[Group]:
        """Drop what calls before that number began, or else all that is in flight.

        Returns the questions in flight among it, whose memory is the caller's to free.
        """
        dropped = [
            (key, work)
            for key, (call, work) in self._works.items()
            if (isinstance(work, Group) if before_call is None else call < before_call)
        ]
        for key, _ in dropped:
            del self._works[key]
        return [work for _, work in dropped if isinstance(work, Group)]

    def clear(self) -> None:
        self._works.clear()


def decode_input(rows: Sequence[Row]) -> DecodeInput:
    """The next decode step of these rows, as plain numbers."""
    lengths = [row.num_suffix for row in rows]
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(id(row.group), []).append(index)
    groups = [group_of(rows[indices[0]]) for indices in members.values()]
    return DecodeInput(
        tokens=[row.result.token_ids[-1] for row in rows],
        positions=[
            group_of(row).request.prompt.next_position + length - 1
            for row, length in zip(rows, lengths)
        ],
        seeds=[row.request.seed for row in rows],
        counts=[len(row.result.token_ids) for row in rows],
        layout=HostLayout(
            spans=[(group.start, len(group.request.prompt)) for group in groups],
            groups=list(members.values()),
            slots=[slot_of(row) for row in rows],
            suffix_lengths=lengths,
        ),
    )


def first_states(rows: Sequence[Row]) -> Tensor:
    """Hidden states [R, D] from which each row's first token is drawn, without own suffixes."""
    return torch.stack([group_of(row).first_hidden for row in rows])


def suffix_groups(
    rows: Sequence[Row],
) -> list[tuple[Prompt, tuple[int, int], list[Sequence[int]]]]:
    """Rows with prompt tokens of their own, as `ModelRunner.extend` takes them."""
    groups: list[tuple[Prompt, tuple[int, int], list[Sequence[int]]]] = []
    previous = None
    for row in rows:
        group = group_of(row)
        if group is not previous:
            span = (group.start, len(group.request.prompt))
            groups.append((group.request.prompt, span, []))
            previous = group
        groups[-1][2].append(row.request.suffix_ids)
    return groups


def group_of(row: Row) -> Group:
    assert row.group is not None
    return row.group


def slot_of(row: Row) -> int:
    assert row.slot is not None
    return row.slot
