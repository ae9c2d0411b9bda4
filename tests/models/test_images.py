"""Preprocessing a picture once for many questions about it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stream_engine.config import ModelConfig
from stream_engine.models import images as images_module
from stream_engine.models import load_model
from stream_engine.models.base import content_hash
from stream_engine.models.images import once_per_image, squared
from tests.models.conftest import GOLDEN

FAMILIES = ["llava15/checkpoint", "omnilmm/checkpoint", "minicpmv25", "minicpmv26", "llava_critic"]


def picture() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (90, 140, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_a_picture_carries_what_was_made_of_it_by_settings():
    calls = []

    @once_per_image
    def size(image: Image.Image, factor: int, *, plus: int = 0) -> int:
        calls.append(factor)
        return image.width * factor + plus

    image, other = picture(), picture()
    assert [size(image, 2), size(image, 2), size(image, 2, plus=1)] == [280, 280, 281]
    assert [size(image, 3), size(other, 2)] == [420, 280]
    assert calls == [2, 2, 3, 2]


@pytest.mark.parametrize("folder", FAMILIES)
def test_further_questions_about_a_picture_share_its_pixels(folder):
    model = load_model(GOLDEN / folder, ModelConfig(device="cpu"))
    image = picture()
    first, second = (model.prompt(question, [image]) for question in ("What?", "Where?"))
    alone = model.prompt("Where?", [picture()])
    pixels = [[getattr(v, "pixels", v) for v in p.vision] for p in (first, second, alone)]
    assert all(a is b for a, b in zip(pixels[0], pixels[1]))
    assert all(torch.equal(a, b) for a, b in zip(pixels[1], pixels[2]))
    assert second.ids == alone.ids
    assert second.digest == alone.digest
    assert first.digest.pixels == second.digest.pixels != ""


def test_content_hashes_differ_with_shape_and_values():
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.ones(2, 3)]
    assert len({content_hash(tensor) for tensor in tensors}) == 3
    assert content_hash(tensors[0]) == content_hash(tensors[0].clone())


@pytest.mark.parametrize("size", [(90, 140), (140, 90), (77, 77), (1, 130), (131, 2), (40, 300)])
@pytest.mark.parametrize("length", [28, 77, 336])
def test_a_padded_square_resized_band_by_band_is_that_of_one_piece_bit_by_bit(
    size, length, monkeypatch
):
    image = picture().resize(size)
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    monkeypatch.setattr(images_module, "BAND_PIXELS", 7 * side)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
        whole = square.resize((length, length), resample=resample)
        banded = squared(image, (122, 116, 104), length, resample)
        assert np.array_equal(np.asarray(whole), np.asarray(banded))


def test_no_piece_of_a_padded_picture_is_as_large_as_its_square(monkeypatch):
    """A picture of 200 x 16000 pixels, a file of 3 kB, took 1.2 GB while it was padded."""
    made: list[int] = []
    new = Image.new

    def watched(mode, size, *arguments):
        made.append(size[0] * size[1])
        return new(mode, size, *arguments)

    monkeypatch.setattr(Image, "new", watched)
    squared(new("RGB", (200, 16_000)), (0, 0, 0), 336, Image.Resampling.BICUBIC)
    assert 0 < max(made) <= 336 * 16_000
