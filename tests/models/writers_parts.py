"""Parts that the tiny checkpoints of several families have in common, written out by hand.

Random weights, files, and what they compute in plain torch operations in float64. Nothing here
comes from the package under test. Legend: T tokens, L patches, D width, H heads.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Language:
    """Sizes of a Llama, Mistral or Qwen2 (which alone has biases for q, k and v)."""

    hidden: int
    vocab: int
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 72
    eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False

    def config(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True)
class Vit:
    """Sizes of a SigLIP-like tower without its head."""

    width: int
    layers: int
    heads: int
    mlp: int
    image: int
    patch: int

    @property
    def side(self) -> int:
        return self.image // self.patch

    def config(self) -> dict[str, int]:
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp,
            "image_size": self.image,
            "patch_size": self.patch,
        }


class Random:
    """Random tensors that bfloat16 holds exactly."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size: int, around: float = 0.0, scale: float = 0.1) -> Tensor:
        values = around + scale * torch.randn(*size, generator=self.generator)
        return values.bfloat16().float()

    def matrix(self, size_out: int, size_in: int, gain: float = 0.8) -> Tensor:
        """Scaled so that float32 rounding stays well under 1e-5 in what comes out."""
        return self(size_out, size_in, scale=gain / size_in**0.5)

    def linear(self, name: str, size_in: int, size_out: int) -> Tensors:
        return {f"{name}.weight": self.matrix(size_out, size_in), f"{name}.bias": self(size_out)}

    def norm(self, name: str, width: int) -> Tensors:
        return {f"{name}.weight": self(width, around=1.0), f"{name}.bias": self(width)}


def random_language(rand: Random, s: Language) -> Tensors:
    """Under the names of a *ForCausalLM."""
    head = s.hidden // s.heads
    tensors = {"model.embed_tokens.weight": rand(s.vocab, s.hidden, scale=0.4)}
    for i in range(s.layers):
        at = f"model.layers.{i}."
        for part, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            tensors[f"{at}self_attn.{part}_proj.weight"] = rand.matrix(heads * head, s.hidden)
            if s.qkv_bias:
                tensors[f"{at}self_attn.{part}_proj.bias"] = rand(heads * head, scale=0.3)
        tensors |= {
            f"{at}self_attn.o_proj.weight": rand.matrix(s.hidden, s.heads * head),
            f"{at}mlp.gate_proj.weight": rand.matrix(s.mlp, s.hidden),
            f"{at}mlp.up_proj.weight": rand.matrix(s.mlp, s.hidden),
            f"{at}mlp.down_proj.weight": rand.matrix(s.hidden, s.mlp),
            f"{at}input_layernorm.weight": rand(s.hidden, around=1.0),
            f"{at}post_attention_layernorm.weight": rand(s.hidden, around=1.0),
        }
    tensors["model.norm.weight"] = rand(s.hidden, around=1.0)
    return tensors | {"lm_head.weight": rand.matrix(s.vocab, s.hidden)}


def random_vit(rand: Random, s: Vit) -> Tensors:
    """Under SigLIP's names, behind `vision_model.`."""
    tensors = {
        "embeddings.patch_embedding.weight": rand(s.width, 3, s.patch, s.patch, scale=0.05),
        "embeddings.patch_embedding.bias": rand(s.width),
        "embeddings.position_embedding.weight": rand(s.side**2, s.width, scale=0.5),
        **rand.norm("post_layernorm", s.width),
    }
    for i in range(s.layers):
        at = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= rand.linear(f"{at}self_attn.{name}", s.width, s.width)
        tensors |= rand.linear(f"{at}mlp.fc1", s.width, s.mlp)
        tensors |= rand.linear(f"{at}mlp.fc2", s.mlp, s.width)
        tensors |= rand.norm(f"{at}layer_norm1", s.width) | rand.norm(f"{at}layer_norm2", s.width)
    return tensors


def random_resampler(rand: Random, queries: int, width: int, source: int) -> Tensors:
    """The parameters that every version stores."""
    tensors = {
        "query": rand(queries, width, scale=0.5),
        "attn.in_proj_weight": rand.matrix(3 * width, width),
        "attn.in_proj_bias": rand(3 * width),
        "proj": rand.matrix(width, width),
        **rand.linear("attn.out_proj", width, width),
    }
    for name in ("ln_q", "ln_kv", "ln_post"):
        tensors |= rand.norm(name, width)
    if source != width:  # equal widths need no projection
        tensors["kv_proj.weight"] = rand.matrix(width, source)
    return tensors


def write(
    folder: Path, config: dict[str, Any], tensors: Tensors, tokenizer: Path, *, shards: int = 3
) -> Path:
    """A checkpoint folder: sharded bfloat16 safetensors, config.json, another's tokenizer."""
    folder.mkdir(parents=True)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: t.bfloat16() for i, (n, t) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / file, folder / file)
    return folder


# -- what they compute, in float64 -----------------------------------------------------------------


def double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}


def layer_norm(x: Tensor, w: Tensors, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: Tensors, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention of q [T, D] over k and v [L, D]; `hidden` is true where nothing looks."""
    q, k, v = (t.unflatten(1, (heads, -1)) for t in (q, k, v))
    scores = torch.einsum("thd,lhd->htl", q, k) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("htl,lhd->thd", scores.softmax(-1), v).flatten(1)


def vit_layers(x: Tensor, w: Tensors, s: Vit, *, layers: int | None = None) -> Tensor:
    """Pre-norm layers with tanh-GELU over one sequence [L, D]; no layer norm behind them."""
    for i in range(s.layers if layers is None else layers):
        at = f"encoder.layers.{i}."
        normed = layer_norm(x, w, f"{at}layer_norm1")
        q, k, v = (linear(normed, w, f"{at}self_attn.{part}_proj") for part in "qkv")
        x = x + linear(attend(q, k, v, s.heads), w, f"{at}self_attn.out_proj")
        inner = linear(layer_norm(x, w, f"{at}layer_norm2"), w, f"{at}mlp.fc1")
        x = x + linear(F.gelu(inner, approximate="tanh"), w, f"{at}mlp.fc2")
    return x


def resample(
    patches: Tensor, w: Tensors, key_positions: Tensor, query_positions: Tensor | float = 0.0
) -> Tensor:
    """[L, source] -> [Q, D]: queries attend to the patches; one head per 128 of D."""
    width = w["proj"].shape[0]
    projected = patches @ w["kv_proj.weight"].T if "kv_proj.weight" in w else patches
    x = layer_norm(projected, w, "ln_kv")
    sources = (layer_norm(w["query"], w, "ln_q") + query_positions, x + key_positions, x)
    parts = zip(sources, w["attn.in_proj_weight"].split(width), w["attn.in_proj_bias"].split(width))
    q, k, v = (source @ weight.T + bias for source, weight, bias in parts)
    out = linear(attend(q, k, v, width // 128), w, "attn.out_proj")
    return layer_norm(out, w, "ln_post") @ w["proj"]


def language_logits(w: Tensors, s: Language, ids: list[int], features: Tensor | None) -> Tensor:
    """Logits [T, vocab] over a sequence in which -200 stands for the next feature row."""
    rows = iter([] if features is None else features)
    table = w["model.embed_tokens.weight"]
    x = torch.stack([next(rows) if i == -200 else table[i] for i in ids])
    assert next(rows, None) is None, "features are left over"
    size = s.hidden // s.heads
    # RoPE frequencies in float32, as every implementation computes them.
    frequencies = 1.0 / (s.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    angles = torch.arange(len(ids), dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1).double()[:, None]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)

    def rotate(t: Tensor) -> Tensor:
        heads = t.unflatten(1, (-1, size))
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (heads * angles.cos() + turned * angles.sin()).flatten(1)

    def per_query_head(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, size)).repeat_interleave(s.heads // s.kv_heads, 1).flatten(1)

    for i in range(s.layers):
        at = f"model.layers.{i}."
        normed = rms_norm(x, w[f"{at}input_layernorm.weight"], s.eps)
        q, k, v = (
            normed @ w[f"{at}self_attn.{p}_proj.weight"].T
            + w.get(f"{at}self_attn.{p}_proj.bias", 0.0)
            for p in "qkv"
        )
        k, v = per_query_head(rotate(k)), per_query_head(v)
        x = x + attend(rotate(q), k, v, s.heads, future) @ w[f"{at}self_attn.o_proj.weight"].T
        normed = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], s.eps)
        gate = F.silu(normed @ w[f"{at}mlp.gate_proj.weight"].T)
        up = normed @ w[f"{at}mlp.up_proj.weight"].T
        x = x + (gate * up) @ w[f"{at}mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], s.eps) @ w["lm_head.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
