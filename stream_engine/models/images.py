"""Picture -> pixel tensor with Pillow and numpy alone, bit-equal to what towers were trained on.

torchvision is not used: its tensor resize differs from Pillow's, and a torchvision that does not
match torch exactly breaks transformers' imports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MadeT = TypeVar("MadeT")
Settings = ParamSpec("Settings")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipPreprocessing:
    """How CLIP's image processor prepares a picture (preprocessor_config.json)."""

    shortest_edge: int
    crop_height: int
    crop_width: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_config(cls, config: dict[str, Any], *, image_size: int) -> ClipPreprocessing:
        """Read a preprocessor_config.json; what it does not say is CLIP's, at `image_size`."""
        size = config.get("size", image_size)
        crop = config.get("crop_size", image_size)
        if isinstance(size, dict):
            size = size.get("shortest_edge", image_size)
        if not isinstance(crop, dict):
            crop = {"height": crop, "width": crop}
        return cls(
            shortest_edge=size,
            crop_height=crop["height"],
            crop_width=crop["width"],
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
            resample=config.get("resample", Image.Resampling.BICUBIC),
        )

    def background(self) -> tuple[int, ...]:
        """The mean colour in bytes, with which pictures are padded."""
        return tuple(int(value * 255) for value in self.mean)


def once_per_image(
    function: Callable[Concatenate[Image.Image, Settings], MadeT],
) -> Callable[Concatenate[Image.Image, Settings], MadeT]:
    """Let a picture carry what `function(picture, settings)` made of it.

    A judge is asked dozens of questions about one decoded picture, which nothing changes meanwhile;
    what was made is freed with it.
    """

    @wraps(function)
    def remembering(image: Image.Image, *settings: Settings.args, **more: Settings.kwargs) -> MadeT:
        made: list[tuple[Any, MadeT]] = image.__dict__.setdefault("_preprocessed", [])
        asked = (function, settings, more)
        for known, result in made:
            if known == asked:
                return result
        made.append((asked, function(image, *settings, **more)))
        return made[-1][1]

    return remembering


BAND_PIXELS = 1 << 22
"""Of a padded square, what is in memory at a time: a picture of 2048 x 2048 in one piece."""


@once_per_image
def clip_pixels(image: Image.Image, preprocessing: ClipPreprocessing, *, pad: bool) -> Tensor:
    """Pixels [3, H, W] in float32: pad to a square if asked, resize, centre crop, normalise."""
    image = image.convert("RGB")
    length, resample = preprocessing.shortest_edge, preprocessing.resample
    if pad:
        image = squared(image, preprocessing.background(), length, resample)
    else:
        image = resize_shortest_edge(image, length, resample)
    image = centre_crop(image, preprocessing.crop_width, preprocessing.crop_height)
    return normalise(image, preprocessing.mean, preprocessing.std)


def squared(
    image: Image.Image, background: tuple[int, ...], length: int, resample: int
) -> Image.Image:
    """An RGB picture centred on a square of its longer side, resized to `length` pixels a side.

    Pillow resizes in two passes, first along the rows, then down the columns. Here the first is run
    on a band of rows at a time, so that the square, which may be a hundred times as large as its
    picture, is never in memory.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    band_height = max(1, BAND_PIXELS // side)
    narrow = Image.new("RGB", (length, side))
    for y in range(0, side, band_height):
        band = Image.new("RGB", (side, min(band_height, side - y)), background)
        band.paste(image, (left, top - y))
        resized = band.resize((length, band.height), resample=Image.Resampling(resample))
        narrow.paste(resized, (0, y))
    return narrow.resize((length, length), resample=Image.Resampling(resample))


def resize_shortest_edge(image: Image.Image, length: int, resample: int) -> Image.Image:
    """Resize so that the shorter side has `length` pixels; the longer one is rounded down."""
    width, height = image.size
    if width <= height:
        size = (length, int(length * height / width))
    else:
        size = (int(length * width / height), length)
    return image.resize(size, resample=Image.Resampling(resample))


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the picture; black where it is smaller than the crop."""
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def normalise(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(bytes / 255 - mean) / std, [3, H, W]; scaled in float64, then rounded to float32."""
    scaled = (np.asarray(image) * (1 / 255)).astype(np.float32)
    pixels = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def normalise_single(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(bytes / 255 - mean) / std, [3, H, W]; every step in float32, as torchvision's ToTensor."""
    unit = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = (unit - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
