"""Tiny random LLaVA-Critic checkpoints, and what they must compute, written out by hand.

Pillow and numpy prepare the pictures, plain torch in float64 computes. Crops are put together row
by row here (no permutes), and shrinking is written out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.models import writers_parts as parts
from tests.models.writers_parts import Language, Random, Tensors, Vit

TOKENIZER = Path(__file__).parents[1] / "data" / "golden" / "llava_critic"
TOWER = "model.vision_tower.vision_tower.vision_model."
LANGUAGE = Language(
    hidden=60, vocab=483, heads=6, kv_heads=2, layers=3, rope_theta=1e6, qkv_bias=True
)
VIT = Vit(width=36, layers=2, heads=3, mlp=52, image=48, patch=14)  # 3 x 3 patches, 6 pixels over


@dataclass(frozen=True)
class Shape:
    """Another shape than the published miniature."""

    language: Language = LANGUAGE
    tower: Vit = VIT
    """With the layers that are stored: one fewer than its config says."""
    projector_layers: int = 2
    aspect: str = "anyres_max_3"
    pinpoints: Any = tuple((48 * w, 48 * h) for w in (1, 2, 3) for h in (1, 2, 3, 4))

    @property
    def max_crops(self) -> int | None:
        return int(self.aspect[11:]) if self.aspect.startswith("anyres_max_") else None


def random_weights(s: Shape, seed: int = 0) -> Tensors:
    """Under the stored names."""
    rand = Random(seed)
    tensors = parts.random_language(rand, s.language)
    tensors |= {TOWER + name: t for name, t in parts.random_vit(rand, s.tower).items()}
    sizes = [s.tower.width] + [s.language.hidden] * s.projector_layers
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        tensors |= rand.linear(f"model.mm_projector.{2 * i}", size_in, size_out)
    return tensors | {"model.image_newline": rand(s.language.hidden, scale=0.5)}


def write(
    folder: Path, s: Shape, tensors: Tensors, *, tower_config: str = "tower", **changes: Any
) -> Path:
    """The layout of lmms-lab/llava-critic-7b, with the tower's config in a folder beside."""
    pinpoints = s.pinpoints
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": s.aspect,
        "image_grid_pinpoints": [list(p) for p in pinpoints]
        if isinstance(pinpoints, tuple)
        else pinpoints,
        "mm_hidden_size": s.tower.width,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": f"mlp{s.projector_layers}x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "tokenizer_model_max_length": 900,
        "use_sliding_window": False,
        **s.language.config(),
        **changes,
    }
    parts.write(folder, config, tensors, TOKENIZER)
    tower = {"model_type": "siglip_vision_model", **s.tower.config()}
    tower["num_hidden_layers"] += 1
    if tower_config:
        (folder / tower_config).mkdir(parents=True)
        (folder / tower_config / "config.json").write_text(json.dumps(tower))
    return folder


def reference_views(image: Image.Image, s: Shape, *, squared: bool = False) -> list[Tensor]:
    """Pixels [3, side, side] of each view, in float64: all of it, then the crops row by row."""
    image, side = image.convert("RGB"), s.tower.image
    if squared:
        longer = max(image.size)
        canvas = Image.new("RGB", (longer, longer), (127, 127, 127))
        canvas.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        return [_pixels(canvas.resize((side, side), Image.Resampling.BICUBIC))]
    columns, rows = reference_grid(image.size, s)
    width, height = columns * side, rows * side
    if width / image.width < height / image.height:
        size = (width, min(height, math.ceil(image.height * (width / image.width))))
    else:
        size = (min(width, math.ceil(image.width * (height / image.height))), height)
    canvas = Image.new("RGB", (width, height))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    seen = [image.resize((side, side), Image.Resampling.BICUBIC)]
    for y in range(rows):
        for x in range(columns):
            seen.append(canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)))
    return [_pixels(view) for view in seen]


def reference_grid(size: tuple[int, int], s: Shape) -> tuple[int, int]:
    """(columns, rows): most pixels kept, then fewest wasted, then first in the list."""
    best, chosen = (0, 0), (0, 0)
    for width, height in s.pinpoints:
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        rank = (kept, kept - width * height)
        if chosen == (0, 0) or rank > best:
            best, chosen = rank, (width // s.tower.image, height // s.tower.image)
    return chosen


def reference_margins(size: tuple[int, int], s: Shape) -> tuple[int, int]:
    """(columns, rows) of patches that are cut off on either side of the grid."""
    columns, rows = reference_grid(size, s)
    width, height = columns * s.tower.side, rows * s.tower.side
    if size[0] / size[1] > width / height:
        return 0, (height - math.floor(size[1] * (width / size[0]))) // 2
    return (width - math.floor(size[0] * (height / size[1]))) // 2, 0


def reference_features(
    tensors: Tensors, s: Shape, size: tuple[int, int], views: list[Tensor]
) -> Tensor:
    """The rows that one picture takes in a prompt, [N, hidden]."""
    w = parts.double(tensors)
    encoded = [_projected(w, s, view) for view in views]
    newline, g = w["model.image_newline"][None], s.tower.side
    if len(views) == 1:
        return torch.cat([encoded[0], newline])
    columns, rows = reference_grid(size, s)
    grid = []  # rows of patches, each [columns * g, hidden]
    for y in range(rows * g):
        crops = encoded[1 + y // g * columns : 1 + y // g * columns + columns]
        grid.append(torch.cat([crop[y % g * g : (y % g + 1) * g] for crop in crops]))
    left, top = reference_margins(size, s)
    grid = [row[left : columns * g - left] for row in grid[top : rows * g - top]]
    if s.max_crops is not None:
        times = math.sqrt(len(grid) * len(grid[0]) / (s.max_crops * g * g))
        if times > 1.1:
            grid = _shrunk(grid, int(len(grid) // times), int(len(grid[0]) // times))
    return torch.cat([encoded[0]] + [torch.cat([row, newline]) for row in grid])


def reference_logits(tensors: Tensors, s: Shape, ids: list[int], features: Tensor | None) -> Tensor:
    return parts.language_logits(parts.double(tensors), s.language, ids, features)


def _projected(w: Tensors, s: Shape, pixels: Tensor) -> Tensor:
    """Tower without its last layer norm, then the projector."""
    tower = {n.removeprefix(TOWER): t for n, t in w.items() if n.startswith(TOWER)}
    kernel = tower["embeddings.patch_embedding.weight"]
    bias = tower["embeddings.patch_embedding.bias"]
    x = F.conv2d(pixels.double()[None], kernel, bias, s.tower.patch)[0].flatten(1).T
    x = parts.vit_layers(x + tower["embeddings.position_embedding.weight"], tower, s.tower)
    for i in range(s.projector_layers):
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2 if i else x
        x = parts.linear(x, w, f"model.mm_projector.{2 * i}")
    return x


def _shrunk(grid: list[Tensor], height: int, width: int) -> list[Tensor]:
    """Bilinear, cell centres aligned, edges repeated."""

    def taps(place: int, old: int, new: int) -> list[tuple[int, float]]:
        centre = max((place + 0.5) * old / new - 0.5, 0.0)
        low = math.floor(centre)
        return [(low, 1 - centre + low), (min(low + 1, old - 1), centre - low)]

    rows = []
    for y in range(height):
        cells = []
        for x in range(width):
            cell = torch.zeros_like(grid[0][0])
            for row, vertical in taps(y, len(grid), height):
                for column, horizontal in taps(x, len(grid[0]), width):
                    cell = cell + vertical * horizontal * grid[row][column]
            cells.append(cell)
        rows.append(torch.stack(cells))
    return rows


def _pixels(image: Image.Image) -> Tensor:
    values = np.array(image).astype(np.float64) / 255
    return torch.from_numpy((values - 0.5) / 0.5).permute(2, 0, 1)
