"""Tiny random MiniCPM-V 2.5 and 2.6 checkpoints, and what they must compute, written out by hand.

Pillow and numpy prepare the pictures, plain torch in float64 computes; patches are separate here
(no strips), slices go through the tower one at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.models import writers_parts as parts
from tests.models.writers_parts import Language, Random, Tensors, Vit

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOKENIZERS = {"2.5": GOLDEN / "minicpmv25", "2.6": GOLDEN / "minicpmv26"}


@dataclass(frozen=True)
class Shape:
    """Another shape than the published miniatures: three resampler heads, another slice limit."""

    version: str
    language: Language
    tower: Vit
    queries: int = 5
    scale: int = 70
    max_slices: int = 6
    dropped_layers: int = 0


def shape(version: str, **changes: Any) -> Shape:
    """2.5 is Llama, 2.6 is Qwen2."""
    language = Language(hidden=384, vocab=481, heads=6, kv_heads=3, layers=3, rope_theta=300000.0)
    language = replace(language, qkv_bias=version == "2.6")
    tower = Vit(width=48, layers=2, heads=4, mlp=80, image=154, patch=14)
    return Shape(version, language, tower, **changes)


def random_weights(s: Shape, seed: int = 0) -> Tensors:
    """Under the stored names."""
    rand = Random(seed)
    language = parts.random_language(rand, s.language)
    tower = parts.random_vit(rand, s.tower)
    resampler = parts.random_resampler(rand, s.queries, s.language.hidden, s.tower.width)
    named = [("llm.", language), ("vpm.", tower), ("resampler.", resampler)]
    return {prefix + name: t for prefix, part in named for name, t in part.items()}


def write(
    folder: Path,
    s: Shape,
    tensors: Tensors,
    *,
    preprocessor: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """The layout of openbmb/MiniCPM-V-2_6; `changes` replace fields of config.json."""
    vision = {"model_type": "siglip" if s.version == "2.6" else "idefics2", **s.tower.config()}
    vision["num_hidden_layers"] += s.dropped_layers
    config = {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "version": s.version if s.version == "2.5" else 2.6,
        "batch_vision_input": True,
        "drop_vision_last_layer": bool(s.dropped_layers),
        "image_size": s.scale,
        "patch_size": s.tower.patch,
        "query_num": s.queries,
        "slice_config": {"max_slice_nums": s.max_slices, "patch_size": 14},
        "slice_mode": True,
        "vision_batch_size": 3,
        "vision_config": vision,
        **({"use_image_id": True} if s.version == "2.6" else {}),
        **s.language.config(),
        **changes,
    }
    tokenizer = TOKENIZERS[s.version]
    parts.write(folder, config, tensors, tokenizer)
    stated = json.loads((tokenizer / "preprocessor_config.json").read_text())
    stated |= {"max_slice_nums": s.max_slices, "scale_resolution": s.scale}
    stated |= {"image_feature_size": s.queries, **(preprocessor or {})}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return folder


@dataclass(frozen=True)
class Piece:
    """Patches [rows * columns, 3, patch, patch] in float64."""

    patches: Tensor
    rows: int
    columns: int


def reference_pieces(image: Image.Image, s: Shape) -> tuple[list[Piece], tuple[int, int]]:
    """The overview, then the slices row by row; and the grid (columns, rows), (0, 0) without."""
    image, patch = image.convert("RGB"), s.tower.patch

    def whole(length: float, unit: int = patch) -> int:
        return max(unit, unit * round(length / unit))

    def scaled(width: float, height: float) -> tuple[int, int]:
        new_height = int(s.scale / math.sqrt(width / height))
        return whole(int(new_height * (width / height))), whole(new_height)

    area = image.width * image.height
    wanted = min(math.ceil(area / s.scale**2), s.max_slices)
    if wanted <= 1:
        return [_piece(image.resize(scaled(*image.size), Image.Resampling.BICUBIC), s)], (0, 0)
    small = scaled(*image.size) if area > s.scale**2 else tuple(whole(n) for n in image.size)
    best, grid = math.inf, (1, 1)
    for count in (wanted - 1, wanted, wanted + 1):
        for columns in range(1, count + 1):
            if count > 1 and count <= s.max_slices and count % columns == 0:
                rows = count // columns
                error = abs(math.log(image.width / image.height) - math.log(columns / rows))
                if error < best:
                    best, grid = error, (columns, rows)
    columns, rows = grid
    width, height = scaled(whole(image.width, columns) / columns, whole(image.height, rows) / rows)
    large = image.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
    pieces = [image.resize(small, Image.Resampling.BICUBIC)]
    for top in range(0, large.height, height):
        for left in range(0, large.width, width):
            pieces.append(large.crop((left, top, left + width, top + height)))
    return [_piece(piece, s) for piece in pieces], grid


def reference_features(tensors: Tensors, s: Shape, pieces: list[Piece]) -> Tensor:
    """One conversation's pieces: [pieces * queries, hidden]."""
    w = parts.double(_under(tensors, "vpm."))
    longest = max(len(piece.patches) for piece in pieces)
    features = []
    for piece in pieces:
        patches, count = piece.patches, len(piece.patches)
        ids = _table_rows(piece.rows, piece.columns, s.tower.side)
        if s.version == "2.5":  # padded to the longest piece, whose strip all positions follow
            patches = torch.cat([patches, patches.new_zeros(longest - count, *patches.shape[1:])])
            ids = _table_rows(1, longest, s.tower.side)
        kernel = w["embeddings.patch_embedding.weight"].flatten(1)
        x = patches.flatten(1) @ kernel.T + w["embeddings.patch_embedding.bias"]
        x = parts.vit_layers(x + w["embeddings.position_embedding.weight"][ids], w, s.tower)
        x = parts.layer_norm(x, w, "post_layernorm")[:count]
        positions = _sine_table(piece.rows, piece.columns, s.language.hidden)
        features.append(parts.resample(x, parts.double(_under(tensors, "resampler.")), positions))
    return torch.cat(features)


def reference_logits(tensors: Tensors, s: Shape, ids: list[int], features: Tensor | None) -> Tensor:
    return parts.language_logits(parts.double(_under(tensors, "llm.")), s.language, ids, features)


def _piece(image: Image.Image, s: Shape) -> Piece:
    patch = s.tower.patch
    values = torch.from_numpy((np.array(image).astype(np.float64) / 255 - 0.5) / 0.5)
    rows, columns = image.height // patch, image.width // patch
    cells = [
        values[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].permute(2, 0, 1)
        for y in range(rows)
        for x in range(columns)
    ]
    return Piece(torch.stack(cells), rows, columns)


def _table_rows(rows: int, columns: int, side: int) -> Tensor:
    """The cell of the table for each patch: patch i of n lies at i/n."""
    assert side % 2 and all(n % side for n in (rows, columns)), "a patch on a cell's edge"
    cells = [
        (y * side // rows) * side + x * side // columns for y in range(rows) for x in range(columns)
    ]
    return torch.tensor(cells)


def _sine_table(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width]: sines and cosines of the column, then of the row."""
    table = np.zeros((rows, columns, width))
    quarter = width // 4
    for k in range(quarter):
        rate = 10000 ** (-k / quarter)
        for y in range(rows):
            for x in range(columns):
                table[y, x, k::quarter] = [
                    math.sin(x * rate),
                    math.cos(x * rate),
                    math.sin(y * rate),
                    math.cos(y * rate),
                ]
    return torch.from_numpy(table.reshape(-1, width))


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
