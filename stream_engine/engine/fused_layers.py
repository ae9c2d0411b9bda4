"""Decoder layers on CPU in fewer passes: norms, rotary embedding and SiLU are one call each.

transformers spends some thirty small operators a layer on them. Layers of the kinds in LAYERS that
are built as transformers builds them take a forward of their own, which is used while a step is
active; elsewhere, and where it does not give what theirs gives, theirs stays.

Legend: N packed tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from stream_kernels.cpu import decode_layer, layer_steps
from stream_kernels.gemm import linear, linears
from torch import Tensor, nn

from stream_engine.engine.attention_steps import (
    ATTENTION_NAME,
    DecodeStep,
    active,
    causal_attention,
    current_step,
    stream_engine_attention,
)
from stream_engine.engine.cpu import OneDNNLinear
from stream_engine.engine.prefix_cache import KVCache

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
products_of, norms_of = attrgetter(*LINEARS), attrgetter(*NORMS)
"""Of a layer."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Of what a layer adds to its input, relative to the largest entry."""


_fused_kinds: dict[type[nn.Module], type[nn.Module]] = {}


class FusedLayer(nn.Module):
    """Mixed into a decoder layer's class, before it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [1, N, D], and the cosines and sines [1, N, head size]."""
        layer = cast(Any, self)
        step = current_step()
        is_step = step is not None and attention_mask is None
        if not is_step or layer.self_attn.config._attn_implementation != ATTENTION_NAME:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        x = hidden_states[0]
        if isinstance(step, DecodeStep):
            products = products_of(layer)
            if _decodes_in_one_call(products, layer.self_attn.head_dim):
                return _decoded(layer, products, step, x, *position_embeddings)[None]
        x = _attended(layer, x, *position_embeddings).add_(x)
        return _fed_forward(layer, x).add_(x)[None]


def _decodes_in_one_call(products: Sequence[Any], head_size: int) -> bool:
    weights = [each.weight for each in products]
    return decode_layer.serves(weights[0].dtype, head_size, weights)


def _decoded(
    layer: Any,
    products: Sequence[Any],
    step: DecodeStep,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
) -> Tensor:
    """What a layer makes of x [N, D], one token a row."""
    attention = layer.self_attn
    norms = norms_of(layer)
    if step.layers is None:
        size = attention.head_dim
        heads, kv_heads, inner = (products[i].weight.shape[0] for i in (0, 1, 4))
        step.layers = decode_layer.DecodeLayers(
            x.contiguous(),
            decode_layer.Sizes(heads // size, kv_heads // size, size, inner),
            (cosines[0], sines[0]),
            (step.prefix_spans, step.group_rows, step.row_slots, step.suffix_lengths),
            in_panels=products[0].weight.is_mkldnn,
        )
    weights = decode_layer.Weights(
        [each.weight for each in norms],
        [each.variance_epsilon for each in norms],
        [each.weight for each in products],
        [each.bias for each in products],
    )
    step.cache.note_window(_window(attention))
    store = step.cache.store(attention.layer_idx, step.layers.key.transpose(0, 1)[None])
    slabs = store.prefix_key, store.prefix_value, store.suffix_key, store.suffix_value
    return step.layers.run(x.contiguous(), weights, decode_layer.Slabs(*slabs), attention.scaling)


def _attended(layer: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """What attention adds to x [N, D]. A function of its own, so that its tensors end with it."""
    attention = layer.self_attn
    normed = _norm(layer.input_layernorm, x)
    query, key, value = (
        each.view(len(x), -1, attention.head_dim)
        for each in _linears((attention.q_proj, attention.k_proj, attention.v_proj), normed)
    )
    del normed
    layer_steps.rotary(query, key, cosines[0], sines[0])
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    out, _ = stream_engine_attention(
        attention, query, key, value, None, attention.scaling, sliding_window=_window(attention)
    )
    del query, key, value
    return _linear(attention.o_proj, out.reshape(len(x), -1))


def _fed_forward(layer: Any, x: Tensor) -> Tensor:
    """What the feed-forward part adds to x [N, D]."""
    mlp = layer.mlp
    normed = _norm(layer.post_attention_layernorm, x)
    gate, up = _linears((mlp.gate_proj, mlp.up_proj), normed)
    del normed
    activated = layer_steps.silu_and_multiply(gate, up)
    del gate, up
    return _linear(mlp.down_proj, activated)


def fuse_layers(module: nn.Module) -> int:
    """Give the decoder layers in `module` the forward above, in place; how many take it.

    Their weights must be where they will stay. 0 where the compiled steps cannot be had.
    """
    layers = [layer for layer in module.modules() if _is_known(layer)]
    if not layers or not _agrees(layers[0]):
        return 0
    for layer in layers:
        layer.__class__ = _fused(type(layer))
    return len(layers)


def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _fused_kinds:
        _fused_kinds[kind] = type(f"Fused{kind.__name__}", (FusedLayer, kind), {})
    return _fused_kinds[kind]


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer is made of the parts that transformers makes it of, and all in one format."""
    kind = type(layer)
    if kind.__name__ not in LAYERS or not kind.__module__.startswith("transformers.models."):
        return False
    products = products_of(layer)
    weights = [each.weight for each in (*products, *norms_of(layer))]
    dtype = weights[-1].dtype
    return (
        all(type(each) in (nn.Linear, OneDNNLinear) for each in products)
        and all(each.device.type == "cpu" and each.dtype == dtype for each in weights)
        and type(layer.get_submodule("mlp.act_fn")).__name__ in ("SiLU", "SiLUActivation")
        and layer_steps.serves(dtype)
    )


def _agrees(layer: nn.Module) -> bool:
    """Whether a layer computes the same either way, for some random tokens."""
    norm = cast(Any, layer).input_layernorm
    attention = cast(Any, layer).self_attn
    generator = torch.Generator().manual_seed(0)
    size, dtype = len(norm.weight), norm.weight.dtype
    x = torch.randn(1, 5, size, generator=generator).to(dtype)
    angles = torch.rand(1, 5, attention.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    config = attention.config
    before, config._attn_implementation = config._attn_implementation, ATTENTION_NAME
    kind = type(layer)
    try:
        with torch.no_grad():
            truth = layer(x, position_embeddings=tables, attention_mask=None)
            layer.__class__ = _fused(kind)
            with active(_Causal()):
                got = layer(x, position_embeddings=tables, attention_mask=None)
    finally:
        layer.__class__ = kind
        config._attn_implementation = before
    added = (truth - x).float()
    return bool((got - truth).float().abs().max() <= TOLERANCE[dtype] * added.abs().max())


class _Causal:
    """A step without a cache: one sequence."""

    def __init__(self) -> None:
        self.cache = KVCache(max_prefix_tokens=1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return causal_attention(query, key, value, scale).transpose(1, 2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return layer_steps.rms_norm(x, norm.weight, norm.variance_epsilon)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _linears(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    return linears(x, [each.weight for each in layers], [each.bias for each in layers])


def _window(attention: Any) -> int | None:
    """The sliding window that transformers' own layer would name."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    named = type(attention).__name__.startswith("Mistral")
    return getattr(attention.config, "sliding_window", None) if named else None
