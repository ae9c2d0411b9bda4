"""LLaVA-NeXT's view of a picture: the whole of it, squeezed, and a grid of sharp crops.

The grid is that of the pinpoints which keeps most of the picture's pixels. The picture is fitted
into it between black margins; after the tower, the features of the margins are cut off again, what
is left is shrunk when it exceeds the budget of `anyres_max_N`, and a newline feature ends each row.

Legend: G patches along a crop's side, D hidden.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Anyres:
    """`image_aspect_ratio` and `image_grid_pinpoints` of a config.json, with the tower's sizes."""

    crop: int
    """Pixels along a crop's side."""
    grid: int
    """Patches along a crop's side, G."""
    pinpoints: tuple[Size, ...]
    max_crops: int | None
    """N of anyres_max_N: more features than N crops have are shrunk. None: never."""


@dataclass(frozen=True)
class Layout:
    """Where one picture's features come from."""

    columns: int
    rows: int
    left: int
    top: int
    width: int
    height: int
    """The part of the rows*G x columns*G features that is not margin."""
    shrunk_width: int
    shrunk_height: int

    @property
    def num_crop_features(self) -> int:
        return self.shrunk_height * (self.shrunk_width + 1)


def layout(size: Size, anyres: Anyres) -> Layout:
    """Follow a picture's size through fitting, cutting of margins and shrinking."""
    fitted = best_pinpoint(size, anyres.pinpoints)
    columns, rows = fitted[0] // anyres.crop, fitted[1] // anyres.crop
    full_width, full_height = columns * anyres.grid, rows * anyres.grid
    left = top = 0
    if size[0] / size[1] > full_width / full_height:
        top = (full_height - int(size[1] * (full_width / size[0]))) // 2
    else:
        left = (full_width - int(size[0] * (full_height / size[1]))) // 2
    width, height = full_width - 2 * left, full_height - 2 * top
    shrunk_width, shrunk_height = width, height
    if anyres.max_crops is not None:
        times = math.sqrt(height * width / (anyres.max_crops * anyres.grid**2))
        if times > 1.1:
            shrunk_width, shrunk_height = int(width // times), int(height // times)
    return Layout(columns, rows, left, top, width, height, shrunk_width, shrunk_height)


def views(image: Image.Image, anyres: Anyres) -> list[Image.Image]:
    """The squeezed whole, then the crops row by row; each of crop x crop pixels, RGB."""
    image = image.convert("RGB")
    fitted = fit(image, best_pinpoint(image.size, anyres.pinpoints))
    step = anyres.crop
    corners = [(x, y) for y in range(0, fitted.height, step) for x in range(0, fitted.width, step)]
    crops = [fitted.crop((x, y, x + step, y + step)) for x, y in corners]
    return [image.resize((step, step), resample=Image.Resampling.BICUBIC), *crops]


def fit(image: Image.Image, target: Size) -> Image.Image:
    """The picture as large as `target` takes it, centred on black."""
    scale_width, scale_height = target[0] / image.width, target[1] / image.height
    if scale_width < scale_height:
        size = (target[0], min(math.ceil(image.height * scale_width), target[1]))
    else:
        size = (min(math.ceil(image.width * scale_height), target[0]), target[1])
    canvas = Image.new("RGB", target, (0, 0, 0))
    corner = ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2)
    canvas.paste(image.resize(size, resample=Image.Resampling.BICUBIC), corner)
    return canvas


def best_pinpoint(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The one that keeps most of the picture's pixels; of equals the smallest, then the first."""

    def kept_and_wasted(target: Size) -> tuple[int, int]:
        scale = min(target[0] / size[0], target[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, -(target[0] * target[1] - kept)

    return max(pinpoints, key=kept_and_wasted)


def merge(features: Tensor, place: Layout, newline: Tensor, anyres: Anyres) -> Tensor:
    """Features [1 + crops, G*G, D] of a picture's views -> its rows in the prompt, [N, D]."""
    whole, crops = features[0], features[1:]
    grid = crops.unflatten(0, (place.rows, place.columns)).unflatten(2, (anyres.grid, anyres.grid))
    grid = grid.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # [D, rows*G, columns*G]
    grid = grid[:, place.top : place.top + place.height, place.left : place.left + place.width]
    shrunk = (place.shrunk_height, place.shrunk_width)
    if shrunk != (place.height, place.width):
        grid = F.interpolate(grid[None], shrunk, mode="bilinear")[0]
    ends = newline[:, None, None].expand(-1, grid.shape[1], 1)
    return torch.cat([whole, torch.cat([grid, ends], dim=2).flatten(1).T])


def read_pinpoints(stated: object, crop: int) -> tuple[Size, ...]:
    """`image_grid_pinpoints`: a list of sizes, its text, or a range such as "(1x1),...,(6x6)".

    Raises:
        ValueError: for anything else.
    """
    if isinstance(stated, str) and "x" in stated:
        corners = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", stated)]
        (first_w, first_h), (last_w, last_h) = corners[0], corners[-1]
        widths, heights = range(first_w, last_w + 1), range(first_h, last_h + 1)
        return tuple((w * crop, h * crop) for w in widths for h in heights)
    sizes = ast.literal_eval(stated) if isinstance(stated, str) else stated
    if not isinstance(sizes, list) or not sizes:
        raise ValueError(f"{stated!r} is not a list of sizes")
    return tuple((int(width), int(height)) for width, height in sizes)
