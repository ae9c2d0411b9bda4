"""The perceiver resampler of OmniLMM and MiniCPM-V: learned queries read one image's patches.

    x = ln_kv(kv_proj(patches));  q = ln_q(query);  out = attention(q, x + positions, x)
    features = ln_post(out) @ proj

OmniLMM stores a position table for its queries, adds it to them, and interpolates it for the keys.
MiniCPM-V 2.5 and 2.6 compute sine positions for the keys and give the queries none.

Legend: B images, L patches, C tower's width, Q queries, D language model's width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
HEAD_WIDTH = 128


class Resampler(nn.Module):
    """Parameters are named as the checkpoints store them; `stores_positions` adds `pos_embed`."""

    def __init__(
        self, *, num_queries: int, width: int, source_width: int, stores_positions: bool
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, width))
        if stores_positions:
            self.pos_embed = nn.Parameter(torch.empty(num_queries, width))
        same = source_width == width  # the original has no projection then
        self.kv_proj = nn.Identity() if same else nn.Linear(source_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // HEAD_WIDTH, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(
        self,
        patches: Tensor,
        key_positions: Tensor,
        *,
        query_positions: Tensor | None = None,
        is_padding: Tensor | None = None,
    ) -> Tensor:
        """[B, L, C] -> [B, Q, D]; positions [L, D] or [B, L, D]; `is_padding` [B, L] hides keys."""
        x = self.ln_kv(self.kv_proj(patches))
        query = self.ln_q(self.query)
        if query_positions is not None:
            query = query + query_positions
        out, _ = self.attn(
            query.expand(len(x), -1, -1),
            x + key_positions.to(x.dtype),
            x,
            key_padding_mask=is_padding,
            need_weights=False,
        )
        return self.ln_post(out) @ self.proj


def resized_positions(table: Tensor, num_patches: int) -> Tensor:
    """A square position table [Q, D] for a square of patches, [L, D]: bicubic, in float32."""
    side, wanted = math.isqrt(len(table)), math.isqrt(num_patches)
    if side == wanted:
        return table
    grid = table.float().unflatten(0, (side, side)).permute(2, 0, 1)
    grid = F.interpolate(grid[None], size=(wanted, wanted), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).mT.to(table.dtype)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions [rows * columns, D] in float32: half of D tells the column, half the row."""
    quarter = width // 4
    rates = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    column = _sines(np.arange(columns, dtype=np.float32), rates)
    row = _sines(np.arange(rows, dtype=np.float32), rates)
    grid = np.empty((rows, columns, 4 * quarter), dtype=np.float32)
    grid[..., : 2 * quarter] = column[None, :]
    grid[..., 2 * quarter :] = row[:, None]
    return torch.from_numpy(grid).flatten(0, 1)


def _sines(positions: np.ndarray, rates: np.ndarray) -> np.ndarray:
    angles = positions[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
