"""The two-part cache: one prefix a question, one suffix a row, and the attention over both.

    prefix slab  [Hkv, T, D] a layer   every question's prompt once, at tokens start .. + length
    suffix slab  [S, Hkv, C, D] a layer   slot s holds the tokens that one row has added

Nothing is copied per answer and nothing is concatenated per step. The cache plugs into
transformers' own modelling code through its attention registry: while a *step* is active, every
layer's attention call hands its query, key and value (after rotary embedding) to the step, which
writes the new keys and values into the slabs and attends. Three steps exist:

    PrefillStep   whole prompts, causal; fills prefixes
    ExtendStep    several tokens a row, causal, over the row's prefix; for scoring, or to fill slots
    DecodeStep    one token a row, over its prefix and its slot

Forwards are packed: batch 1, sequences one after the other, no padding and no mask. Without an
active step the function is ordinary causal attention, which is what the self-test compares with.
The module knows nothing of requests, sampling or models.

Legend: N packed tokens, R rows, Hq/Hkv query/key heads, D head size, A longest suffix of a step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from stream_kernels import HostLayout, attention_with_lse, merge_by_lse, prefix_attention
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "stream_engine"


class UnsupportedAttentionError(RuntimeError):
    """A layer asks for attention that the shared prefix cannot give (sinks, soft caps ...)."""


class CacheFullError(RuntimeError):
    """No room for another prefix; wait until a question finishes."""


@dataclass
class LayerStore:
    """One layer's slabs."""

    prefix_key: Tensor  # [Hkv, T, D]
    prefix_value: Tensor
    suffix_key: Tensor  # [S, Hkv, C, D]
    suffix_value: Tensor


class SpanAllocator:
    """First-fit allocation of token spans in [0, capacity)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, length)

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int | None:
        """The start of a free span of `length` tokens, or None."""
        for place, (start, free) in enumerate(self._free):
            if free >= length:
                if free == length:
                    del self._free[place]
                else:
                    self._free[place] = (start + length, free - length)
                return start
        return None

    def release(self, start: int, length: int) -> None:
        insort(self._free, (start, length))
        merged: list[tuple[int, int]] = []
        for span in self._free:
            if merged and sum(merged[-1]) == span[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + span[1])
            else:
                merged.append(span)
        self._free = merged

    def grow(self, capacity: int) -> None:
        old, self.capacity = self.capacity, capacity
        self.release(old, capacity - old)


class KVCache:
    """The slabs of all layers, and who owns which part of them.

    Shapes are learnt from the first keys seen, so that no model's config is read. Slabs grow
    geometrically, prefixes up to `max_prefix_tokens`.
    """

    def __init__(self, *, max_prefix_tokens: int) -> None:
        self.max_prefix_tokens = max_prefix_tokens
        self.layers: dict[int, LayerStore] = {}
        self.spans = SpanAllocator(0)
        self.num_slots = 0
        self.slot_capacity = 0
        self._free_slots: list[int] = []
        self.sliding_window: int | None = None
        self.num_spare_slots = 0
        """Slots at the end that are never handed out; captured steps write their padding there."""
        self.generation = 0
        """Counts changes of any slab's size: what holds an address compares it. The slab itself
        follows when a forward next asks for it, which a replayed graph never does."""

    def clear(self) -> None:
        """Free all memory; every span and slot handed out becomes invalid."""
        self.layers.clear()
        self.spans = SpanAllocator(0)
        self.num_slots = self.slot_capacity = 0
        self._free_slots = []
        self.generation += 1

    # -- who owns what ---------------------------------------------------------------------------

    def allocate_span(self, length: int) -> int:
        """A span of the prefix slab. Raises CacheFullError when the limit allows no more."""
        start = self.spans.allocate(length)
        if start is None:
            in_use = self.spans.capacity - self.spans.num_free
            wanted = max(self.spans.capacity + length, 2 * self.spans.capacity)
            capacity = min(wanted, max(self.max_prefix_tokens, in_use + length))
            is_at_limit = self.spans.capacity >= self.max_prefix_tokens
            if in_use and (is_at_limit or in_use + length > self.max_prefix_tokens):
                # At the limit what is free lies in pieces: they join as questions end.
                raise CacheFullError(f"{in_use} prefix tokens in use, {length} more asked for")
            self.spans.grow(max(capacity, self.spans.capacity + length))
            self.generation += 1
            start = self.spans.allocate(length)
            assert start is not None
        return start

    def release_span(self, start: int, length: int) -> None:
        self.spans.release(start, length)

    def allocate_slot(self) -> int:
        """The lowest free slot, so that slots in use stay together."""
        if len(self._free_slots) <= self.num_spare_slots:
            old, self.num_slots = self.num_slots, self.num_slots + max(8, self.num_slots // 2)
            self._free_slots += range(old, self.num_slots)
            self.generation += 1
        return self._free_slots.pop(0)

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._free_slots)

    def release_slot(self, slot: int) -> None:
        insort(self._free_slots, slot)

    def scrub_slot(self, slot: int) -> None:
        """Zero a slot that holds NaN: masked positions of a slab must be finite numbers."""
        for store in self.layers.values():
            if slot < len(store.suffix_key):  # a slot that no step has written to may lie beyond
                store.suffix_key[slot] = 0
                store.suffix_value[slot] = 0

    def reserve_slot_tokens(self, tokens: int) -> None:
        """Make every slot hold at least `tokens`."""
        if tokens > self.slot_capacity:
            self.slot_capacity = max(32, tokens, min(2 * self.slot_capacity, tokens + 256))
            self.generation += 1

    def preallocate(self, *, prefix_tokens: int, slots: int, slot_tokens: int) -> None:
        """Fix the slabs' sizes ahead, so that their addresses never change (CUDA graphs)."""
        if prefix_tokens > self.spans.capacity:
            self.spans.grow(prefix_tokens)
        if slots > self.num_slots:
            self._free_slots += range(self.num_slots, slots)
            self.num_slots = slots
        self.slot_capacity = max(self.slot_capacity, slot_tokens)
        self.generation += 1

    # -- memory ----------------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers; 0 before the first forward."""
        return sum(
            2 * store.prefix_key.shape[0] * store.prefix_key.shape[2] * store.prefix_key.itemsize
            for store in self.layers.values()
        )

    @property
    def num_bytes(self) -> int:
        return sum(
            t.nbytes
            for s in self.layers.values()
            for t in (s.prefix_key, s.prefix_value, s.suffix_key, s.suffix_value)
        )

    def store(self, layer: int, key: Tensor) -> LayerStore:
        """The layer's slabs, as large as the allocators now say. `key` [1, Hkv, N, D] shows how."""
        heads, size = key.shape[1], key.shape[3]
        old = self.layers.get(layer)
        prefix_shape = (heads, self.spans.capacity, size)
        suffix_shape = (self.num_slots, heads, self.slot_capacity, size)
        if old is None:
            self.layers[layer] = LayerStore(
                key.new_zeros(prefix_shape),
                key.new_zeros(prefix_shape),
                key.new_zeros(suffix_shape),
                key.new_zeros(suffix_shape),
            )
        elif old.prefix_key.shape != prefix_shape or old.suffix_key.shape != suffix_shape:
            for name, shape in (("prefix", prefix_shape), ("suffix", suffix_shape)):
                for part in ("key", "value"):
                    slab = getattr(old, f"{name}_{part}")
                    if slab.shape != shape:
                        setattr(old, f"{name}_{part}", _grown(slab, shape))
        return self.layers[layer]


def _grown(slab: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A larger slab that starts with what the smaller one holds (zeros elsewhere)."""
    larger = slab.new_zeros(shape)
    larger[tuple(slice(0, size) for size in slab.shape)] = slab
    return larger


# -- steps ---------------------------------------------------------------------------------------


class Step(Protocol):
    """What one forward of the language model does with each layer's keys and values."""

    cache: KVCache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, Hq, N, D], key and value [1, Hkv, N, D] -> [1, N, Hq, D]."""


@dataclass
class PrefillStep:
    """Whole prompts, causal. Each layer takes the spans in order, over one forward or several."""

    cache: KVCache
    spans: Sequence[tuple[int, int]]  # (start, length) of each prompt, in packing order
    _next: dict[int, int] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        store = self.cache.store(layer, key)
        place, outs, offset = self._next.get(layer, 0), [], 0
        while offset < query.shape[2]:
            if place == len(self.spans):
                raise UnsupportedAttentionError(f"layer {layer} attends more than once")
            start, length = self.spans[place]
            part = slice(offset, offset + length)
            store.prefix_key[:, start : start + length] = key[0, :, part]
            store.prefix_value[:, start : start + length] = value[0, :, part]
            outs.append(
                causal_attention(query[:, :, part], key[:, :, part], value[:, :, part], scale)
            )
            place, offset = place + 1, offset + length
        assert offset == query.shape[2], f"{query.shape[2]} tokens do not end with a prompt"
        self._next[layer] = place
        return torch.cat(outs, dim=2).transpose(1, 2)


@dataclass
class ExtendStep:
    """Several new tokens a row, causal, over the row's shared prefix.

    `groups` lists, in packing order, each prefix's span and the lengths of its rows. With `slots`
    (one a row) the new keys and values are kept there, for decoding to go on.
    """

    cache: KVCache
    groups: Sequence[tuple[tuple[int, int], Sequence[int]]]
    slots: Sequence[int] | None = None

    def __post_init__(self) -> None:
        lengths = [n for _, rows in self.groups for n in rows]
        self._lengths = lengths
        self._rows = torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)
        )  # [N]: the row of each packed token
        self._columns = torch.cat([torch.arange(n) for n in lengths])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        store = self.cache.store(layer, key)
        rows, columns = self._rows.to(query.device), self._columns.to(query.device)
        self._rows, self._columns = rows, columns
        shape = (len(self._lengths), max(self._lengths))

        def padded(packed: Tensor) -> Tensor:  # [1, H, N, D] -> [R, H, A, D]
            grid = packed.new_zeros(*shape, packed.shape[1], packed.shape[3])
            grid[rows, columns] = packed[0].transpose(0, 1)
            return grid.transpose(1, 2)

        own_key, own_value = padded(key), padded(value)
        own, own_lse = attention_with_lse(
            padded(query), own_key, own_value, scale=scale, causal=True
        )
        own = own.transpose(1, 2)[rows, columns]  # [N, Hq, D]
        own_lse = own_lse.transpose(1, 2)[rows, columns]  # [N, Hq]
        outs, lses, offset = [], [], 0
        for (start, length), row_lengths in self.groups:
            tokens = slice(offset, offset + sum(row_lengths))
            out, lse = attention_with_lse(
                query[:, :, tokens],
                store.prefix_key[None, :, start : start + length],
                store.prefix_value[None, :, start : start + length],
                scale=scale,
            )
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
            offset = tokens.stop
        if self.slots is not None:
            slots = torch.tensor(self.slots, device=query.device)
            longest = shape[1]
            store.suffix_key[slots, :, :longest] = own_key
            store.suffix_value[slots, :, :longest] = own_value
        return merge_by_lse(torch.cat(outs), torch.cat(lses), own, own_lse)[None]


@dataclass
class DecodeStep:
    """One new token a row, over its group's prefix and its slot; see `stream_kernels`.

    The int32 tensors may be the static buffers of a CUDA graph: nothing here reads them back.
    """

    cache: KVCache
    prefix_spans: Tensor  # [G, 2]
    group_rows: Tensor  # [G, K], padded with -1
    row_slots: Tensor  # [R]
    suffix_lengths: Tensor  # [R], the step's own token counted
    host: HostLayout | None = None

    def __post_init__(self) -> None:
        self._slots = self.row_slots.long()
        self._last = self.suffix_lengths.long() - 1

    @classmethod
    def from_host(cls, cache: KVCache, host: HostLayout, device: torch.device) -> DecodeStep:
        """The step of a layout that is made anew for each token."""

        def on_device(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        widest = max(len(rows) for rows in host.groups)
        return cls(
            cache,
            on_device(host.spans),
            on_device([rows + [-1] * (widest - len(rows)) for rows in host.groups]),
            on_device(host.slots),
            on_device(host.suffix_lengths),
            host,
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        store = self.cache.store(layer, key)
        store.suffix_key[self._slots, :, self._last] = key[0].transpose(0, 1)
        store.suffix_value[self._slots, :, self._last] = value[0].transpose(0, 1)
        out = prefix_attention(
            query[0].transpose(0, 1),
            store.prefix_key,
            store.prefix_value,
            self.prefix_spans,
            self.group_rows,
            store.suffix_key,
            store.suffix_value,
            self.row_slots,
            self.suffix_lengths,
            scale=scale,
            host=self.host,
        )
        return out[None]


# -- the plug --------------------------------------------------------------------------------------

_active_step: ContextVar[Step | None] = ContextVar("stream_engine_step", default=None)


@contextmanager
def active(step: Step) -> Iterator[None]:
    """Route the language model's attention to `step` inside the block."""
    token = _active_step.set(step)
    try:
        yield
    finally:
        _active_step.reset(token)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Plain causal attention of one sequence: [1, Hq, N, D] over [1, Hkv, N, D]."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scale, enable_gqa=grouped
    )


def stream_engine_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function in transformers' registry; see the module header.

    Raises:
        UnsupportedAttentionError: for soft-capped scores, attention sinks, a mask, training, or
            values of another size than keys.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttentionError(f"{type(module).__name__} wants attention {name}")
    if attention_mask is not None or dropout:
        raise UnsupportedAttentionError(f"{type(module).__name__} passes a mask or dropout")
    if value.shape[-1] != key.shape[-1]:  # multi-head latent attention; no kernel here takes it
        sizes = f"values of {value.shape[-1]} beside keys of {key.shape[-1]}"
        raise UnsupportedAttentionError(f"{type(module).__name__} has {sizes}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step = _active_step.get()
    if step is None:
        return causal_attention(query, key, value, scale).transpose(1, 2), None
    window = kwargs.get("sliding_window")
    if window is not None:
        known = step.cache.sliding_window
        step.cache.sliding_window = window if known is None else min(window, known)
    return step.attend(module.layer_idx, query, key, value, scale), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, stream_engine_attention)
