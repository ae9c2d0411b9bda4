"""The KV cache, in two parts: one prefix a question, one suffix a row.

    prefix slab  [Hkv, T, D] a layer   every question's prompt once, at tokens start .. + length
    suffix slab  [S, Hkv, C, D] a layer   slot s holds the tokens that one row has added

Nothing is copied per answer and nothing is concatenated per step. The module knows nothing of
requests, sampling or models; how attention runs over both parts stands in attention_steps.py.

Legend: T tokens of all prefixes, S slots, C tokens of a slot, Hkv key heads, D head size.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from torch import Tensor


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

    def note_window(self, window: int | None) -> None:
        """A layer attends to so many tokens: the narrowest of all is kept."""
        if window is not None:
            known = self.sliding_window
            self.sliding_window = window if known is None else min(window, known)

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


# -- the plug --------------------------------------------------------------------------------------
