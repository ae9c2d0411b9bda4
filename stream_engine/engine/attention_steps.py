"""How attention runs in each step of the engine, over the two-part cache.

The cache plugs into transformers' own modelling code through its attention registry: while a *step*
is active, every layer's attention call hands its query, key and value (after rotary embedding) to
the step, which writes the new keys and values into the slabs and attends. Three steps exist:

    PrefillStep   whole prompts, causal; fills prefixes
    ExtendStep    several tokens a row, causal, over the row's prefix; for scoring, or to fill slots
    DecodeStep    one token a row, over its prefix and its slot

Forwards are packed: batch 1, sequences one after the other, no padding and no mask. Without an
active step the function is ordinary causal attention, which is what the self-test compares with.

Legend: N packed tokens, R rows, Hq/Hkv query/key heads, D head size, A longest suffix of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from stream_kernels import HostLayout, attention_with_lse, merge_by_lse, prefix_attention
from stream_kernels.cpu import extend_attention
from stream_kernels.cpu.decode_layer import DecodeLayers
from torch import Tensor, nn
from transformers import AttentionInterface

from stream_engine.engine.prefix_cache import KVCache, LayerStore

ATTENTION_NAME = "stream_engine"


class UnsupportedAttentionError(RuntimeError):
    """A layer asks for attention that the shared prefix cannot give (sinks, soft caps ...)."""


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
        place, lengths, offset = self._next.get(layer, 0), [], 0
        while offset < query.shape[2]:
            if place == len(self.spans):
                raise UnsupportedAttentionError(f"layer {layer} attends more than once")
            start, length = self.spans[place]
            part = slice(offset, offset + length)
            store.prefix_key[:, start : start + length] = key[0, :, part]
            store.prefix_value[:, start : start + length] = value[0, :, part]
            lengths.append(length)
            place, offset = place + 1, offset + length
        assert offset == query.shape[2], f"{query.shape[2]} tokens do not end with a prompt"
        self._next[layer] = place
        rows = tuple((length, (0, 0)) for length in lengths)
        compiled = _compiled_attention(query, key, value, store, rows, scale)
        if compiled is not None:
            return compiled
        parts = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
        outs = [causal_attention(q, k, v, scale) for q, k, v in parts]
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
        self._spans = tuple((n, span) for span, rows in self.groups for n in rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        store = self.cache.store(layer, key)
        rows, columns = self._rows.to(query.device), self._columns.to(query.device)
        self._rows, self._columns = rows, columns
        if self.slots is not None:
            slots = torch.tensor(self.slots, device=query.device)[rows]
            store.suffix_key[slots, :, columns] = _by_token(key)
            store.suffix_value[slots, :, columns] = _by_token(value)
        compiled = _compiled_attention(query, key, value, store, self._spans, scale)
        if compiled is not None:
            return compiled
        shape = (len(self._lengths), max(self._lengths))

        def padded(packed: Tensor) -> Tensor:  # [1, H, N, D] -> [R, H, A, D]
            grid = packed.new_zeros(*shape, packed.shape[1], packed.shape[3])
            grid[rows, columns] = _by_token(packed)
            return grid.transpose(1, 2)

        own, own_lse = attention_with_lse(
            padded(query), padded(key), padded(value), scale=scale, causal=True
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
    layers: DecodeLayers | None = (
        None  # what the layers of this step share, where one call does each
    )

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
        new: tuple[Tensor, Tensor] | None = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        if query.device.type != "cpu":  # on a GPU, the places are worked out once for all layers
            for slab, part in zip((store.suffix_key, store.suffix_value), (key, value)):
                slab[self._slots, :, self._last] = part[0].transpose(0, 1)
            new = None
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
            new=new,
        )
        return out[None]


def _compiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: LayerStore,
    rows: extend_attention.Rows,
    scale: float,
) -> Tensor | None:
    """What a step gives of packed rows; None where the compiled form does not take them."""
    packed = _by_token(query), _by_token(key), _by_token(value)
    prefix = store.prefix_key, store.prefix_value
    if not extend_attention.serves(*packed, prefix):
        return None
    chunks = extend_attention.chunks_of(rows, query.shape[1] // key.shape[1])
    return extend_attention.extend_attention(*packed, prefix, chunks, scale=scale)[None]


def _by_token(packed: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D]."""
    return packed[0].transpose(0, 1)


_active_step: ContextVar[Step | None] = ContextVar("stream_engine_step", default=None)


@contextmanager
def active(step: Step) -> Iterator[None]:
    """Route the language model's attention to `step` inside the block."""
    token = _active_step.set(step)
    try:
        yield
    finally:
        _active_step.reset(token)


def current_step() -> Step | None:
    """The step that attention is routed to, if any."""
    return _active_step.get()


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
    step.cache.note_window(kwargs.get("sliding_window"))
    return step.attend(module.layer_idx, query, key, value, scale), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, stream_engine_attention)
