"""Tiny random LLaVA-1.5 checkpoints in every published layout, and what they must compute.

Nothing here comes from the package under test: files are written with safetensors, torch.save and
json, and the model is written out in plain torch operations in float64. Legend: T tokens, D hidden,
H heads.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER = Path(__file__).parents[1] / "data" / "golden" / "llava15" / "checkpoint"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model; grouped-query attention unless the two head counts agree."""

    hidden: int = 48
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 80
    vocab: int = 480
    vision_hidden: int = 40
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 64
    image: int = 42
    patch: int = 14
    select_layer: int = -2
    projector_layers: int = 2
    rope_theta: float = 10000.0
    tied: bool = False

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Weights:
    """Tensors by short names; `text`, `vision` and `projector` hold what their names say."""

    shape: Shape
    text: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    projector: dict[str, Tensor] = field(default_factory=dict)


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    """Weights that float16 holds exactly, so that every storage type is lossless."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int, around: float = 0.0, scale: float = 0.08) -> Tensor:
        return (around + scale * torch.randn(*size, generator=generator)).half().float()

    s = shape
    text = {"model.embed_tokens.weight": rand(s.vocab, s.hidden, scale=0.1 if s.tied else 0.5)}
    head = s.hidden // s.heads
    for i in range(s.layers):
        layer = f"model.layers.{i}."
        text |= {
            layer + "input_layernorm.weight": rand(s.hidden, around=1.0),
            layer + "post_attention_layernorm.weight": rand(s.hidden, around=1.0),
            layer + "self_attn.q_proj.weight": rand(s.heads * head, s.hidden, scale=0.14),
            layer + "self_attn.k_proj.weight": rand(s.kv_heads * head, s.hidden, scale=0.14),
            layer + "self_attn.v_proj.weight": rand(s.kv_heads * head, s.hidden),
            layer + "self_attn.o_proj.weight": rand(s.hidden, s.heads * head),
            layer + "mlp.gate_proj.weight": rand(s.mlp, s.hidden),
            layer + "mlp.up_proj.weight": rand(s.mlp, s.hidden),
            layer + "mlp.down_proj.weight": rand(s.hidden, s.mlp),
        }
    text["model.norm.weight"] = rand(s.hidden, around=1.0)
    if not s.tied:
        text["lm_head.weight"] = rand(s.vocab, s.hidden, scale=0.1)

    d = s.vision_hidden
    vision = {
        "embeddings.class_embedding": rand(d),
        "embeddings.patch_embedding.weight": rand(d, 3, s.patch, s.patch),
        "embeddings.position_embedding.weight": rand(s.patches + 1, d, scale=0.3),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(s.vision_layers):
        layer = f"encoder.layers.{i}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        linears = [(f"self_attn.{p}_proj", d, d) for p in "qkv"] + [("self_attn.out_proj", d, d)]
        linears += [("mlp.fc1", d, s.vision_mlp), ("mlp.fc2", s.vision_mlp, d)]
        for name, size_in, size_out in linears:
            vision[f"{layer}{name}.weight"] = rand(size_out, size_in)
            vision[f"{layer}{name}.bias"] = rand(size_out)
    for name in norms:
        vision[name + ".weight"] = rand(d, around=1.0)
        vision[name + ".bias"] = rand(d)

    projector = {}
    for i in range(s.projector_layers):
        projector[f"{i}.weight"] = rand(s.hidden, s.hidden if i else d)
        projector[f"{i}.bias"] = rand(s.hidden)
    return Weights(shape, text, vision, projector)


# -- files -----------------------------------------------------------------------------------------


def write_original(
    folder: Path,
    weights: Weights,
    *,
    tower: str = "beside",
    kind: str = "safetensors",
    shards: int = 2,
    dtype: torch.dtype = torch.float16,
    **config: Any,
) -> Path:
    """The layout of liuhaotian/llava-v1.5-7b; `tower` is "beside", "inside" or "absent"."""
    s = weights.shape
    named = "openai/clip-vit-large-patch14-336"
    tensors = dict(weights.text)
    for name, tensor in weights.projector.items():
        layer, _, part = name.partition(".")
        middle = "" if s.projector_layers == 1 else f"{2 * int(layer)}."
        tensors[f"model.mm_projector.{middle}{part}"] = tensor
    for i in range(s.layers):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if tower == "inside":
        prefix = "model.vision_tower.vision_tower.vision_model."
        tensors |= {prefix + name: tensor for name, tensor in weights.vision.items()}
        tensors[prefix + "embeddings.position_ids"] = torch.arange(s.patches + 1)[None]
    _write(folder, tensors, kind=kind, shards=shards, dtype=dtype)
    projector = "linear" if s.projector_layers == 1 else f"mlp{s.projector_layers}x_gelu"
    stated = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava" if tower == "beside" else "llava_llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_aspect_ratio": "pad",
        "mm_hidden_size": s.vision_hidden,
        "mm_projector_type": projector,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": s.select_layer,
        "mm_vision_tower": named,
        "rope_theta": s.rope_theta,
        "rope_scaling": None,
        **_text_config(s),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(stated))
    if tower != "absent":
        write_clip(folder / named, weights, with_weights=tower == "beside")
    return folder


def write_hf(
    folder: Path,
    weights: Weights,
    *,
    names: str = "hub",
    kind: str = "safetensors",
    shards: int = 2,
    dtype: torch.dtype = torch.float16,
    added_rows: int = 5,
    **config: Any,
) -> Path:
    """The layout of llava-hf/llava-1.5-7b-hf; `names` is "hub" or "flat" (newer savers)."""
    s = weights.shape
    tensors = {}
    for name, tensor in weights.text.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = torch.cat([tensor, torch.full((added_rows, s.hidden), 0.25)])
        if names == "hub":
            name = f"language_model.{name}"
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        tensors[name] = tensor
    prefix = "" if names == "hub" else "model."
    tensors |= {f"{prefix}vision_tower.vision_model.{n}": t for n, t in weights.vision.items()}
    for name, tensor in weights.projector.items():
        layer, _, part = name.partition(".")
        tensors[f"{prefix}multi_modal_projector.linear_{int(layer) + 1}.{part}"] = tensor
    _write(folder, tensors, kind=kind, shards=shards, dtype=dtype)
    stated = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_token_index": s.vocab,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": s.select_layer,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "rope_theta": s.rope_theta,
            **_text_config(s),
            "vocab_size": s.vocab + added_rows,
        },
        "vision_config": _vision_config(s),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(s)))
    return folder


def write_clip(folder: Path, weights: Weights, *, with_weights: bool = True) -> Path:
    """A whole CLIP model (both halves), as OpenAI's repository has it, or its configs alone."""
    folder.mkdir(parents=True)
    stated = {"model_type": "clip", "vision_config": _vision_config(weights.shape)}
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(weights.shape)))
    if with_weights:
        tensors = {f"vision_model.{name}": tensor for name, tensor in weights.vision.items()}
        positions = torch.arange(weights.shape.patches + 1)[None]
        tensors["vision_model.embeddings.position_ids"] = positions
        tensors["text_model.final_layer_norm.weight"] = torch.ones(4)
        tensors["logit_scale"] = torch.tensor(2.0)
        tensors["visual_projection.weight"] = torch.ones(4, weights.shape.vision_hidden)
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _write(
    folder: Path, tensors: dict[str, Tensor], *, kind: str, shards: int, dtype: torch.dtype
) -> None:
    folder.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for shard in range(shards):
        part = {
            name: (t.to(dtype) if t.is_floating_point() else t).contiguous()
            for place, (name, t) in enumerate(tensors.items())
            if place % shards == shard
        }
        number = "" if shards == 1 else f"-{shard + 1:05}-of-{shards:05}"
        file = f"{stem}{number}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _text_config(s: Shape) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "vocab_size": s.vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": s.tied,
    }


def _vision_config(s: Shape) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": s.vision_hidden,
        "intermediate_size": s.vision_mlp,
        "num_hidden_layers": s.vision_layers,
        "num_attention_heads": s.vision_heads,
        "image_size": s.image,
        "patch_size": s.patch,
        "projection_dim": 16,
    }


def _preprocessor(s: Shape) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": s.image},
        "crop_size": {"height": s.image, "width": s.image},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
    }


# -- what the model computes, in float64 -----------------------------------------------------------


def reference_features(weights: Weights, pixels: Tensor) -> Tensor:
    """CLIP up to the selected layer without the class token, then the projector: [patches, D]."""
    s, w = weights.shape, {name: t.double() for name, t in weights.vision.items()}
    kernel = w["embeddings.patch_embedding.weight"]
    patches = F.conv2d(pixels.double()[None], kernel, stride=s.patch)
    x = torch.cat([w["embeddings.class_embedding"][None], patches[0].flatten(1).T])
    x = _layer_norm(x + w["embeddings.position_embedding.weight"], w, "pre_layrnorm")
    states = [x]
    for i in range(s.vision_layers):
        layer = f"encoder.layers.{i}."
        normed = _layer_norm(x, w, layer + "layer_norm1")
        q, k, v = (
            _linear(normed, w, f"{layer}self_attn.{p}_proj").unflatten(1, (s.vision_heads, -1))
            for p in "qkv"
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + _linear(mixed, w, layer + "self_attn.out_proj")
        inner = _linear(_layer_norm(x, w, layer + "layer_norm2"), w, layer + "mlp.fc1")
        x = x + _linear(inner * torch.sigmoid(1.702 * inner), w, layer + "mlp.fc2")
        states.append(x)
    x = states[s.select_layer][1:]
    for i in range(s.projector_layers):
        x = F.gelu(x) if i else x
        x = _linear(x, {name: t.double() for name, t in weights.projector.items()}, str(i))
    return x


def reference_logits(weights: Weights, ids: list[int], features: Tensor | None) -> Tensor:
    """Llama over a sequence in which -200 stands for the next feature row: logits [T, vocab]."""
    s, w = weights.shape, {name: t.double() for name, t in weights.text.items()}
    rows = iter([] if features is None else features)
    table = w["model.embed_tokens.weight"]
    x = torch.stack([next(rows) if i == -200 else table[i] for i in ids])
    assert next(rows, None) is None
    size = s.hidden // s.heads
    # RoPE frequencies in float32, as every implementation computes them.
    frequencies = 1.0 / (s.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    angles = torch.arange(len(ids), dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1).double()[:, None]  # [T, 1, size]
    causal = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)

    def rotate(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    for i in range(s.layers):
        layer = f"model.layers.{i}."
        normed = _rms_norm(x, w[layer + "input_layernorm.weight"])
        q, k, v = (
            (normed @ w[f"{layer}self_attn.{p}_proj.weight"].T).unflatten(1, (-1, size))
            for p in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + causal
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[layer + "self_attn.o_proj.weight"].T
        normed = _rms_norm(x, w[layer + "post_attention_layernorm.weight"])
        gate = F.silu(normed @ w[layer + "mlp.gate_proj.weight"].T)
        up = normed @ w[layer + "mlp.up_proj.weight"].T
        x = x + (gate * up) @ w[layer + "mlp.down_proj.weight"].T
    head = table if s.tied else w["lm_head.weight"]
    return _rms_norm(x, w["model.norm.weight"]) @ head.T


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps=1e-5)


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]
