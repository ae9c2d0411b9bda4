"""Decode steps: one token for every row of the batch, eagerly or by replaying a CUDA graph.

A step is launch-bound on a GPU (some hundred small kernels for a few milliseconds of work), so
there the whole step, sampling included, is captured once per size of the batch and replayed. The
graph feeds its own tokens back, and the host reads several steps at once: rows that end in between
waste at most STEPS_PER_READ - 1 tokens. The random numbers depend on seed and position only, so
neither changes what is drawn.

The module knows nothing of requests: it is handed rows as plain numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from stream_kernels import HostLayout
from stream_kernels.forms import takes_triton
from torch import Tensor

from stream_engine.device_errors import hidden_out_of_memory
from stream_engine.engine.attention_steps import DecodeStep, active
from stream_engine.engine.draw import draw
from stream_engine.engine.memory import STEPS_PER_READ

if TYPE_CHECKING:
    from stream_engine.engine.runner import ModelRunner

logger = logging.getLogger(__name__)

ROW_BUCKET = 32


@dataclass
class DecodeInput:
    """The batch as the host knows it. One entry a row, in the batch's order."""

    tokens: list[int]  # the last token drawn, to be fed
    positions: list[int]  # its rotary position
    seeds: list[int]
    counts: list[int]  # tokens drawn so far: the position of the next random number
    layout: HostLayout  # suffix lengths count the fed token


def decode_eagerly(runner: ModelRunner, batch: DecodeInput) -> Tensor:
    """One step; hidden states [R, D] from which the next tokens are drawn."""
    device, model = runner.model.device, runner.model
    step = DecodeStep.from_host(runner.cache, batch.layout, device)
    tokens = torch.tensor(batch.tokens, device=device)
    positions = torch.tensor(batch.positions, device=device)
    with active(step):
        return model.forward(model.embed(tokens), positions)


class CaptureError(RuntimeError):
    """A decode step of this model cannot be captured; it can still run eagerly."""


def can_capture(runner: ModelRunner) -> bool:
    """Whether decode steps of this model may be CUDA graphs.

    Where the Triton forms are rehearsed on CPU, steps have a graph's static buffers and no graph.
    """
    model = runner.model
    return takes_triton(model.device) and model.tensor_parallel == 1 and model.offload is None


class Decoder:
    """How one model's decode steps run: captured where that can be, else eagerly."""

    def __init__(self, runner: ModelRunner) -> None:
        self.graphs: GraphDecoder | None = None
        if can_capture(runner) and runner.model.shares_prefix:
            self.capture_with(GraphDecoder(runner))

    def capture_with(self, graphs: GraphDecoder) -> None:
        self.graphs = graphs
        graphs.runner.drop_captures = graphs.forget

    @property
    def steps_per_read(self) -> int:
        """How many steps run before the host reads what they drew."""
        return 1 if self.graphs is None else STEPS_PER_READ

    def run_ahead(
        self, batch: DecodeInput, num_steps: int
    ) -> list[tuple[list[int], list[float]]] | None:
        """Tokens and log-probs of each of `num_steps` captured steps; None: run it eagerly."""
        if self.graphs is None:
            return None
        try:
            tokens, logps = self.graphs.run(batch, num_steps)
        except CaptureError as error:
            logger.warning("decode steps run eagerly, which is slower: %s", error)
            self.graphs = None
            return None
        return list(zip(tokens, logps))


class GraphDecoder:
    """Captured decode steps of one engine, one graph per bucket of rows and groups."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        runner.cache.num_spare_slots = 1
        self.generation = -1
        self.graphs: dict[tuple[int, int, int], _CapturedStep] = {}
        self.site = _CaptureSite(runner.model.device)
        self.row_bucket = ROW_BUCKET if runner.model.device.type == "cuda" else ROW_BUCKET // 8

    def forget(self) -> None:
        """Free the graphs: the slabs that they read and write are given up."""
        self.graphs.clear()

    def run(self, batch: DecodeInput, num_steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """`num_steps` steps: tokens and log-probs, [steps][R]. A NaN log-prob marks a bad row."""
        if self.generation != self.runner.cache.generation:
            self.forget()
            self.site.renew_pool()
            self.generation = self.runner.cache.generation
        num_rows, layout = len(batch.tokens), batch.layout
        widest = max(len(rows) for rows in layout.groups)
        widest = _round_up(widest, 4)
        num_spare_groups = -(-self.row_bucket // widest)
        size = (
            _round_up(num_rows, self.row_bucket),
            _round_up(len(layout.groups), 4) + num_spare_groups,
            widest,
        )
        captured = self.graphs.get(size)
        if captured is None:
            try:
                captured = self.graphs[size] = _CapturedStep(self.runner, *size, site=self.site)
            except RuntimeError as error:
                shortage = hidden_out_of_memory(error)
                if shortage is not None:
                    raise shortage from None
                raise CaptureError(str(error)) from error
        captured.load(batch)
        captured.replay(num_steps)
        tokens = captured.history_tokens[:num_steps, :num_rows].tolist()
        logps = captured.history_logps[:num_steps, :num_rows].tolist()
        return tokens, logps


class _CaptureSite:
    """Where an engine's steps are captured: a stream and a memory pool of its own.

    cuBLAS keeps a workspace for each stream; on this one it is made while steps warm up, outside
    of the pool, and no other engine's graphs come to use it. One pool serves all graphs that are
    alive together: no two run at once, and what outlives a step lies outside. Once they are
    dropped the pool is not used again, because torch may not have let go of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool: Any = None

    def renew_pool(self) -> None:
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None

    def capture(
        self, warm_up: Callable[[], None], step: Callable[[], None]
    ) -> torch.cuda.CUDAGraph | None:
        """Run `warm_up`, then record `step`; None where there are no graphs.

        The current device and stream are what they were, come what may.
        """
        if self.stream is None:
            return None
        with torch.cuda.device(self.device):
            return self.record(self.stream, warm_up, step)

    def record(
        self, stream: torch.cuda.Stream, warm_up: Callable[[], None], step: Callable[[], None]
    ) -> torch.cuda.CUDAGraph:
        """As `capture`, on the device that is current."""
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                warm_up()
        finally:
            current.wait_stream(stream)
        try:
            # Threads that prepare the next prompts must not be able to break a capture.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
            ):
                step()
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own current
            self.end_allocation()
            # The device's generator takes itself to be recorded still, and would refuse to draw.
            generator = torch.cuda.default_generators[stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph

    def end_allocation(self) -> None:
        """Let the allocator leave the pool of a capture that failed.

        A capture that its own step has made invalid ends with an error before torch does so; from
        then on the allocator would give no freed block back to the device.
        """
        assert self.stream is not None
        with suppress(RuntimeError):  # where the capture did end
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            torch._C._cuda_releasePool(self.stream.device_index, self.pool)
        self.renew_pool()


class _CapturedStep:
    """One graph and its static buffers. Spare rows have empty prefixes; none reads their draws."""

    def __init__(
        self, runner: ModelRunner, rows: int, groups: int, widest: int, *, site: _CaptureSite
    ) -> None:
        self.runner = runner
        device = runner.model.device
        widest = max(widest, 1)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.num_rows, self.num_groups, self.widest = rows, groups, widest
        self.tokens = zeros(rows, dtype=torch.int64)
        self.positions = zeros(rows, dtype=torch.int64)
        self.seeds = zeros(rows, dtype=torch.int64)
        self.counts = zeros(rows, dtype=torch.int64)
        self.spans = zeros(groups, 2)
        self.group_rows = zeros(groups, widest) - 1
        self.slots = zeros(rows)
        self.lengths = zeros(rows) + 1
        self.history_tokens = zeros(STEPS_PER_READ, rows, dtype=torch.int64)
        self.history_logps = zeros(STEPS_PER_READ, rows, dtype=torch.float32)
        self.cursor = zeros(1, dtype=torch.int64)
        # What a capture computes meanwhile goes to the spare slot.
        self.slots.fill_(runner.cache.num_slots - 1)
        self.graph = site.capture(self.warm_up, self.step)

    def warm_up(self) -> None:
        """Compile kernels, make workspaces, let the slabs grow: all that a capture must not."""
        for _ in range(2):
            self.cursor.zero_()
            self.step()
        self.cursor.zero_()

    def step(self) -> None:
        """Feed the tokens, draw the next, note them, and move every row one place on."""
        runner, model = self.runner, self.runner.model
        decode = DecodeStep(
            runner.cache, self.spans, self.group_rows, self.slots, self.lengths, None
        )
        # A row that has ended runs on until the host reads: its places must exist in tables.
        positions = self.positions.clamp(max=runner.max_positions - 1)
        with active(decode):
            hidden = model.forward(model.embed(self.tokens), positions)
        seen = None
        if runner.seen is not None:
            slots = self.slots.long()
            runner.seen.note(slots, self.tokens)
            seen = runner.seen.of(slots)
        tokens, logps = draw(runner, runner.logits(hidden), self.seeds, self.counts, seen)
        place = self.cursor[None].expand(1, self.num_rows)
        self.history_tokens.scatter_(0, place, tokens[None])
        self.history_logps.scatter_(0, place, logps[None])
        self.tokens.copy_(tokens)
        for moving in (self.positions, self.counts, self.lengths, self.cursor):
            moving += 1

    def load(self, batch: DecodeInput) -> None:
        """Copy a batch into the static buffers; spare rows feed token 0 into the spare slot."""
        layout, spare = batch.layout, self.num_rows - len(batch.tokens)
        spare_slot = self.runner.cache.num_slots - 1
        rows = list(range(self.num_rows))
        spare_rows = rows[self.num_rows - spare :]
        members = [*layout.groups]
        for start in range(0, spare, self.widest):
            members.append(spare_rows[start : start + self.widest])
        members += [[]] * (self.num_groups - len(members))
        groups = [group + [-1] * (self.widest - len(group)) for group in members]
        spans = [list(span) for span in layout.spans]
        spans += [[0, 0]] * (self.num_groups - len(spans))
        for buffer, values in (
            (self.tokens, batch.tokens + [0] * spare),
            (self.positions, batch.positions + [0] * spare),
            (self.seeds, batch.seeds + [0] * spare),
            (self.counts, batch.counts + [0] * spare),
            (self.spans, spans),
            (self.group_rows, groups),
            (self.slots, layout.slots + [spare_slot] * spare),
            (self.lengths, layout.suffix_lengths + [1] * spare),
        ):
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
        self.cursor.zero_()

    def replay(self, num_steps: int) -> None:
        """Run the step `num_steps` times, as a graph where there is one."""
        step = self.step if self.graph is None else self.graph.replay
        for _ in range(num_steps):
            step()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
