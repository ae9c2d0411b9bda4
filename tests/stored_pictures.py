"""Pictures in every form that readers meet, as they are stored, and what a model sees of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from stream_engine.models.base import VisionLanguageModel
from stream_engine.pictures import decode_image, read_picture


def drawing() -> Image.Image:
    bands = [Image.linear_gradient("L").rotate(90 * n).resize((60, 44)) for n in range(3)]
    return Image.merge("RGB", bands)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """What is stored of a picture that comes in this form."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return read_picture(buffer.getvalue(), 10**6).data


def glass() -> Image.Image:
    image = drawing().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep() -> Image.Image:
    return Image.fromarray(np.linspace(0, 60_000, 60 * 44).reshape(44, 60).astype(np.uint16))


def turned() -> dict[str, Any]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return {"exif": exif}


STORED: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(drawing(), "JPEG"),
    "jpeg-turned": lambda: encoded(drawing(), "JPEG", **turned()),
    "jpeg-cmyk": lambda: encoded(drawing().convert("CMYK"), "JPEG"),
    "grey": lambda: encoded(drawing().convert("L")),
    "black-and-white": lambda: encoded(drawing().convert("1")),
    "palette": lambda: encoded(drawing().quantize(16)),
    "transparent": lambda: encoded(glass()),
    "grey-transparent": lambda: encoded(glass().convert("LA")),
    "opaque-alpha": lambda: encoded(drawing().convert("RGBA")),
    "sixteen-bits": lambda: encoded(deep()),
    "moving": lambda: encoded(drawing(), "GIF", save_all=True, append_images=[deep().convert("L")]),
    "webp": lambda: encoded(drawing(), "WEBP"),
}


def seen_by_model(model: VisionLanguageModel, stored: bytes) -> str:
    """Hash of the pixels that the engine hands to the model for a stored picture."""
    return model.ask("What?", [decode_image(stored, "picture")]).digest.pixels


def seen_by_trainer(model: VisionLanguageModel, stored: bytes) -> str:
    """The same for what every trainer does with the stored bytes: `convert("RGB")`."""
    return model.ask("What?", [Image.open(io.BytesIO(stored)).convert("RGB")]).digest.pixels
