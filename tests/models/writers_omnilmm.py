"""A tiny random OmniLMM checkpoint, and what it must compute, in plain torch in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.models import writers_parts as parts
from tests.models.writers_parts import Language, Random, Tensors

TOKENIZER = Path(__file__).parents[1] / "data" / "golden" / "omnilmm" / "checkpoint"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


LANGUAGE = Language(hidden=256, vocab=441, heads=8, kv_heads=2, eps=1e-5)


@dataclass(frozen=True)
class Shape:
    """Another shape than the published one's miniature: two heads in the resampler, 16 queries."""

    language: Language = LANGUAGE
    queries: int = 16
    image: int = 84
    patch: int = 14
    width: int = 40
    heads: int = 5
    blocks: int = 3
    mlp: int = 56
    table_side: int = 4


def random_weights(shape: Shape, seed: int = 0) -> Tensors:
    """Under the stored names."""
    rand = Random(seed)
    s, at = shape, "model.vision_tower."
    tensors = parts.random_language(rand, s.language)
    tensors |= {
        f"{at}cls_token": rand(1, 1, s.width),
        f"{at}pos_embed": rand(1, 1 + s.table_side**2, s.width, scale=0.5),
        f"{at}patch_embed.proj.weight": rand(s.width, 3, s.patch, s.patch, scale=0.05),
        f"{at}patch_embed.proj.bias": rand(s.width),
        **rand.norm(f"{at}norm", s.width),
    }
    for i in range(s.blocks):
        block = f"{at}blocks.{i}."
        tensors |= {
            f"{block}attn.qkv.weight": rand.matrix(3 * s.width, s.width),
            f"{block}attn.q_bias": rand(s.width),
            f"{block}attn.v_bias": rand(s.width),
            **rand.linear(f"{block}attn.proj", s.width, s.width),
            **rand.linear(f"{block}mlp.fc1", s.width, s.mlp),
            **rand.linear(f"{block}mlp.fc2", s.mlp, s.width),
            **rand.norm(f"{block}norm1", s.width),
            **rand.norm(f"{block}norm2", s.width),
        }
    hidden = s.language.hidden
    resampler = parts.random_resampler(rand, s.queries, hidden, s.width)
    resampler["pos_embed"] = rand(s.queries, hidden, scale=0.5)
    return tensors | {f"model.resampler.{name}": t for name, t in resampler.items()}


def write(folder: Path, shape: Shape, tensors: Tensors, **changes: Any) -> Path:
    """The layout of openbmb/OmniLMM-12B; `changes` replace fields of config.json."""
    config = {
        "architectures": ["OmniLMMForCausalLM"],
        "model_type": "omnilmm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_size": shape.image,
        "mm_hidden_size": shape.language.hidden,
        "mm_use_im_start_end": True,
        "mm_vision_tower": "eva02_enormous_patch14_clip_224.laion2b_plus",
        "mm_vision_heads": shape.heads,
        "num_query": shape.queries,
        "sliding_window": 4096,
        **shape.language.config(),
        **changes,
    }
    return parts.write(folder, config, tensors, TOKENIZER)


def reference_pixels(image: Image.Image, shape: Shape) -> Tensor:
    """Squeezed to the square by Pillow; then arithmetic in float64."""
    squeezed = image.convert("RGB").resize((shape.image, shape.image), Image.Resampling.BICUBIC)
    values = np.array(squeezed).astype(np.float64) / 255
    return torch.from_numpy((values - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)


def reference_features(tensors: Tensors, shape: Shape, pixels: Tensor) -> Tensor:
    """Tower without the class token, then the resampler: [queries, hidden]."""
    s, w = shape, parts.double(_under(tensors, "model.vision_tower."))
    side = math.ceil(s.image / s.patch)
    canvas = torch.zeros(1, 3, side * s.patch, side * s.patch, dtype=torch.float64)
    canvas[0, :, : s.image, : s.image] = pixels  # zeros to the right and below
    patches = F.conv2d(canvas, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], s.patch)
    table = w["pos_embed"][0]
    positions = torch.cat([table[:1], _enlarged(table[1:], side, antialias=True)])
    x = torch.cat([w["cls_token"][0], patches[0].flatten(1).T]) + positions
    for i in range(s.blocks):
        at = f"blocks.{i}."
        q, k, v = (x @ part.T for part in w[f"{at}attn.qkv.weight"].chunk(3))
        mixed = parts.attend(q + w[f"{at}attn.q_bias"], k, v + w[f"{at}attn.v_bias"], s.heads)
        x = x + parts.layer_norm(parts.linear(mixed, w, f"{at}attn.proj"), w, f"{at}norm1")
        inner = parts.linear(x, w, f"{at}mlp.fc1")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + parts.layer_norm(parts.linear(inner, w, f"{at}mlp.fc2"), w, f"{at}norm2")
    x = parts.layer_norm(x, w, "norm")[1:]
    w = parts.double(_under(tensors, "model.resampler."))
    keys = _enlarged(w["pos_embed"], side, antialias=False)
    return parts.resample(x, w, keys, w["pos_embed"])


def reference_logits(
    tensors: Tensors, shape: Shape, ids: list[int], features: Tensor | None
) -> Tensor:
    return parts.language_logits(parts.double(tensors), shape.language, ids, features)


def _enlarged(table: Tensor, side: int, *, antialias: bool) -> Tensor:
    """A square table [S*S, D] -> [side*side, D] by Keys' cubic convolution, written out.

    With antialias a = -0.5 (Pillow's), without it a = -0.75 and clamped edges (OpenCV's).
    """
    old = math.isqrt(len(table))
    matrix = torch.zeros(side, old, dtype=torch.float64)
    a = -0.5 if antialias else -0.75
    for row in range(side):
        centre = (row + 0.5) * old / side - 0.5
        taps = range(math.floor(centre) - 1, math.floor(centre) + 3)
        weights = [_cubic(abs(centre - tap), a) for tap in taps]
        if antialias:  # taps outside are dropped, the rest is normalised
            inside = [(t, w) for t, w in zip(taps, weights) if 0 <= t < old]
            total = sum(w for _, w in inside)
            for tap, weight in inside:
                matrix[row, tap] += weight / total
        else:  # taps outside are the edge's
            for tap, weight in zip(taps, weights):
                matrix[row, min(max(tap, 0), old - 1)] += weight
    grid = table.unflatten(0, (old, old))
    return torch.einsum("yi,xj,ijd->yxd", matrix, matrix, grid).flatten(0, 1)


def _cubic(x: float, a: float) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
