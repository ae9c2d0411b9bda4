"""EVA02-E, the vision tower of OmniLMM-12B and RLAIF-V-12B, in plain PyTorch.

A vision transformer with post-norm blocks (x + norm1(attention(x)), x + norm2(mlp(x))), biases for
queries and values but not for keys, GELU by the error function, and a learned position table that
is resampled to the picture's grid. Parameters are named as the checkpoints store them.

Legend: B pictures, N tokens (class token first), C width, P patch size, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


class EvaTower(nn.Module):
    """[B, 3, H, W] pixels -> [B, 1 + ceil(H/P) * ceil(W/P), C] features, class token first."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        patch_size: int,
        num_positions: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, num_positions, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(EvaBlock(width, num_heads, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        patches = self.patch_embed.proj(F.pad(pixels, padding))  # type: ignore[operator]
        rows, columns = patches.shape[2:]
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
        x = x + self.positions(rows, columns)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table for a grid of patches: bicubic with antialiasing, also when it grows."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        of_class, grid = self.pos_embed.float().split([1, side * side], dim=1)
        grid = F.interpolate(
            grid.unflatten(1, (side, side)).permute(0, 3, 1, 2),
            size=(rows, columns),
            mode="bicubic",
            antialias=True,
        )
        return torch.cat([of_class, grid.flatten(2).mT], dim=1).to(self.pos_embed.dtype)


class EvaBlock(nn.Module):
    """One post-norm block."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attn = EvaAttention(width, num_heads)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, mlp_width)
        self.mlp.fc2 = nn.Linear(mlp_width, width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        hidden = F.gelu(self.mlp.fc1(x))  # type: ignore[operator]
        return x + self.norm2(self.mlp.fc2(hidden))  # type: ignore[operator]


class EvaAttention(nn.Module):
    """Self-attention over one picture's tokens; the key has no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.qkv = nn.Module()  # not a Linear: its bias is put together from two parts
        self.qkv.weight = nn.Parameter(torch.empty(3 * width, width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # type: ignore[arg-type]
        query, key, value = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))
