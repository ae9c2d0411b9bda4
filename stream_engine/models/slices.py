"""How MiniCPM-V cuts a picture: a small overview, then a grid of slices of about one tower's size.

The grid is the one of at most `max_slices` cells, and of about area / scale_resolution^2 of them,
whose shape is nearest to the picture's (in the logarithm of width / height). Every piece is resized
to whole patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from stream_engine.models.images import normalise_single, once_per_image

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Slicing:
    """preprocessor_config.json, as far as it bears on pixels."""

    max_slices: int
    scale_resolution: int
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Slice:
    """One piece: its patches side by side in a strip [3, P, rows * columns * P], row by row."""

    pixels: Tensor
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns


@once_per_image
def slice_image(image: Image.Image, slicing: Slicing) -> tuple[list[Slice], Size | None]:
    """The overview and the slices row by row, and the grid (columns, rows); None when unsliced."""
    image = image.convert("RGB")
    grid = slice_grid(image.size, slicing)
    pieces = [image.resize(patched_size(image.size, slicing), resample=Image.Resampling.BICUBIC)]
    if grid is not None:
        pieces += cut(image, grid, slicing)
    return [strip(piece, slicing) for piece in pieces], grid


def slice_grid(size: Size, slicing: Slicing) -> Size | None:
    """(columns, rows) of the grid for a picture, or None when the overview is enough."""
    width, height = size
    wanted = min(math.ceil(width * height / slicing.scale_resolution**2), slicing.max_slices)
    if wanted <= 1:
        return None
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= slicing.max_slices]
    grids = [(m, n // m) for n in counts for m in range(1, n + 1) if n % m == 0]
    log_ratio = math.log(width / height)
    return min(grids, key=lambda grid: abs(log_ratio - math.log(grid[0] / grid[1])))


def patched_size(size: tuple[float, float], slicing: Slicing) -> Size:
    """The size in whole patches of about scale_resolution^2 pixels and nearly the same shape."""
    ratio = size[0] / size[1]
    height = int(slicing.scale_resolution / math.sqrt(ratio))
    width = int(height * ratio)
    return nearest_multiple(width, slicing.patch_size), nearest_multiple(height, slicing.patch_size)


def cut(image: Image.Image, grid: Size, slicing: Slicing) -> list[Image.Image]:
    """The picture resized so that every cell is whole patches, cut into cells row by row."""
    columns, rows = grid
    cell = (
        nearest_multiple(image.width, columns) / columns,
        nearest_multiple(image.height, rows) / rows,
    )
    width, height = patched_size(cell, slicing)
    image = image.resize((width * columns, height * rows), resample=Image.Resampling.BICUBIC)
    corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]


def nearest_multiple(length: float, unit: int) -> int:
    """The multiple of `unit` nearest to `length`, at least one."""
    return max(round(length / unit) * unit, unit)


def strip(piece: Image.Image, slicing: Slicing) -> Slice:
    """Normalise a piece and lay its patches side by side."""
    patch = slicing.patch_size
    rows, columns = piece.height // patch, piece.width // patch
    pixels = normalise_single(piece, slicing.mean, slicing.std)
    grid = pixels.reshape(3, rows, patch, columns, patch).permute(0, 2, 1, 3, 4)
    return Slice(grid.reshape(3, patch, -1), rows, columns)
