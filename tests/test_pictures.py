import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import get_sampling

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.pictures import check_size, read_picture
from tests.samples import picture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def reason_of(call, *arguments) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    return caught.value.reason


@pytest.mark.parametrize("format", FORMATS)
def test_whole_images_pass(format: str):
    assert read_picture(data := picture(3, format, size=(120, 80)), 120 * 80) == (data, ())


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_cut_anywhere_is_refused(format: str):
    data = picture(3, format, size=(64, 48))
    pad = 1 if format == "GIF" else 0  # the last byte of a GIF says only that it ends
    for size in range(0, len(data) - pad, 7):
        reason = reason_of(read_picture, data[:size], 10**6)
        assert reason in ("truncated_image", "undecodable_image")
    assert reason_of(read_picture, data[: len(data) * 2 // 3], 10**6) == "truncated_image"


def test_a_progressive_jpeg_cut_between_its_scans_is_refused():
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    read_picture(data, 10**6)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 2
    assert reason_of(read_picture, data[: scans[-1]], 10**6) == "truncated_image"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no image at all", id="text"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\0" * 100, id="png-header-only"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF", id="eps"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="svg"),
    ],
)
def test_what_is_no_image_is_undecodable(data: bytes):
    assert reason_of(read_picture, data, 10**6) == "undecodable_image"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html>", "a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b'<?xml version="1.0"?>\n<svg xmlns="">', "SVG"),
        (b"abc", "begins b'abc'"),
    ],
)
def test_what_stands_in_a_pictures_place_is_named(data: bytes, says: str):
    with pytest.raises(RecordError, match=re.escape(says)):
        read_picture(data, 10**6)


def test_a_flipped_bit_in_a_png_is_noticed():
    data = bytearray(picture(3, size=(64, 64)))
    data[len(data) // 2] ^= 1
    with pytest.raises(RecordError):
        read_picture(bytes(data), 10**6)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and would take that memory if it were decoded."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\0" * 10_000)


def png(header: bytes, pixels: bytes) -> bytes:
    """A PNG of these very parts."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    parts = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("size", [(1001, 1000), (14_000, 14_000), (100_000, 100_000)])
def test_a_bomb_is_refused_by_its_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(read_picture, bomb(*size), 10**6) == "image_too_large"


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((8000, 1000), id="panorama"),
        pytest.param((16384, 3900), id="telephone-panorama"),
        pytest.param((13000, 13000), id="large-square"),
        pytest.param((60, 9000), id="column-of-text"),
    ],
)
def test_ordinary_long_pictures_pass(size):
    check_size(*size, InputConfig().max_image_pixels)


@pytest.mark.parametrize("size", [(1200, 149_000), (149_000, 1200), (1, 400), (13_000, 50)])
def test_a_picture_that_models_would_blow_up_is_refused(size):
    """1200 x 149000 pixels are within max_image_pixels, and would take 89 GB on a square; the
    short side of 1 x 400, brought to 336 pixels, makes the other 134400."""
    with pytest.raises(RecordError, match="crop or shrink it") as caught:
        check_size(*size, InputConfig().max_image_pixels)
    assert caught.value.reason == "image_too_long"


def test_the_length_of_a_picture_is_read_from_its_header():
    assert reason_of(read_picture, bomb(3000, 10), 10**6) == "image_too_long"


def deep_picture(mode: str, format: str) -> bytes:
    """A ramp from 0 to 60000, as a depth camera or a scanner stores it."""
    ramp = np.linspace(0, 60_000, 24 * 16).reshape(16, 24)
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(dtype)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16", "PPM"), ("I;16", "JPEG2000")]
)
def test_sixteen_bit_grey_is_stored_as_eight(mode: str, format: str):
    """Pillow makes RGB of it by cutting off at 255: models were shown blank sheets."""
    data, changes = read_picture(deep_picture(mode, format), 10**6)
    assert changes == ("depth",)
    ramp = np.linspace(0, 60_000, 24 * 16).reshape(16, 24).astype(np.uint16)
    assert (np.asarray(decoded(data)) == ramp >> 8).all()


def test_twelve_bits_in_sixteen_are_seen():
    """An X-ray of 12 bits would be all but black if the upper byte were taken."""
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)).save(buffer, "PNG")
    pixels = np.asarray(decoded(read_picture(buffer.getvalue(), 10**6).data))
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_black_and_white_are_refused(mode: str):
    with pytest.raises(RecordError, match="scale them to 8 bits") as caught:
        read_picture(deep_picture(mode, "TIFF"), 10**6)
    assert caught.value.reason == "unsupported_pixel_depth"


def as_bytes(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def glass() -> Image.Image:
    """Red, green and blue thirds of different alpha; what lies beneath is black."""
    image = Image.new("RGBA", (9, 4))
    for i, colour in enumerate([(255, 0, 0, 255), (0, 255, 0, 128), (0, 0, 0, 0)]):
        image.paste(colour, (3 * i, 0, 3 * i + 3, 4))
    return image


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("LA", "PNG"),
        ("P", "GIF"),
        ("P", "PNG"),
    ],
)
def test_transparency_is_put_on_white(mode: str, format: str):
    """`convert("RGB")` shows what lies beneath, black for most; viewers show the page."""
    image = glass() if mode == "RGBA" else glass().convert(mode)
    options = {"lossless": True} if format == "WEBP" else {}
    if mode == "P":
        image = glass().convert("RGB").quantize(8)
        options = {"transparency": image.getpixel((8, 0))}
    data, changes = read_picture(as_bytes(image, format, **options), 10**6)
    assert changes == ("transparency",)
    shown = decoded(data)
    assert not shown.has_transparency_data
    assert shown.convert("RGB").getpixel((8, 0)) == (255, 255, 255)
    if mode == "RGBA":
        assert shown.convert("RGB").getpixel((4, 0)) == (127, 255, 127)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA"])
def test_pictures_that_all_see_alike_keep_their_bytes(mode: str):
    data = as_bytes(Image.new("RGB", (6, 4), (40, 200, 90)).convert(mode), "PNG")
    assert read_picture(data, 100) == (data, ())


@pytest.mark.parametrize(("mode", "format"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")])
def test_other_colours_are_stored_as_rgb(mode: str, format: str):
    colours = Image.new("RGB", (16, 16), (200, 100, 30))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        colours = ImageCms.profileToProfile(colours, *profiles, outputMode="LAB")
    else:
        colours = colours.convert(mode)
    data = as_bytes(colours, format)
    stored, changes = read_picture(data, 10**6)
    assert changes == ("colours",)
    assert decoded(stored).mode == "RGB"
    difference = np.asarray(decoded(stored), int) - np.asarray(decoded(data).convert("RGB"), int)
    assert abs(difference).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_a_moving_picture_the_first_frame_is_stored(format: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    data = as_bytes(frames[0], format, save_all=True, append_images=frames[1:])
    stored, changes = read_picture(data, 10**6)
    assert changes == ("first_frame",)
    assert getattr(decoded(stored), "n_frames", 1) == 1
    red, green, blue = decoded(stored).convert("RGB").getpixel((4, 4))
    assert red > 240 and green < 10 and blue < 10


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_damaged_in_its_middle_is_named(options: dict):
    """Half of it turns grey, and Pillow says nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    data = as_bytes(Image.fromarray(noise).resize((600, 400)), "JPEG", **options)
    read_picture(data, 10**6)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(2000) + data[middle + 2000 :]
    decoded(damaged)
    assert reason_of(read_picture, damaged, 10**6) == "damaged_image"


def test_a_jpeg_with_bytes_behind_its_end_passes():
    """Cameras append previews and notes."""
    read_picture(picture(3, "JPEG", size=(64, 48)) + b"a note" * 100, 10**6)


def test_sixteen_bits_in_three_channels_pass():
    """Pillow reads these as 8 bits by their upper bytes."""
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = png(header, b"\0" + bytes([200, 0] * 6))
    read_picture(data, 10**6)
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (200, 200, 200)


def quarters(format: str, orientation: int, **options) -> bytes:
    """Four differently coloured quarters, 64 x 32, with an EXIF orientation."""
    image = Image.new("RGB", (64, 32))
    for i, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 60)]):
        image.paste(colour, (32 * (i % 2), 16 * (i // 2), 32 * (i % 2) + 32, 16 * (i // 2) + 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a camera"
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_stored_as_it_is_to_be_seen(format: str, orientation: int):
    """Models saw the pixels as the file lays them out, sideways, while `datasets` turns them for
    the trainer on loading, and other trainers do not."""
    data = quarters(format, orientation, **({"lossless": True} if format == "WEBP" else {}))
    assert read_picture(data, 10**6).changes == (() if orientation == 1 else ("turned",))
    seen = ImageOps.exif_transpose(decoded(data)).convert("RGB")
    stored = decoded(read_picture(data, 10**6).data)
    assert stored.format == format
    assert stored.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert stored.size == seen.size == ((64, 32) if orientation < 5 else (32, 64))
    error = np.asarray(stored.convert("RGB"), np.int16) - np.asarray(seen, np.int16)
    assert abs(error).mean() <= (3 if format == "JPEG" else 0)  # colours blur at the edges


@pytest.mark.parametrize(
    ("subsampling", "kept"),
    [
        pytest.param("4:4:4", 0, id="full"),
        pytest.param("4:2:0", 2, id="quarter"),
        pytest.param("4:2:2", 0, id="half-width-has-no-half-height"),
    ],
)
def test_a_turned_jpeg_keeps_its_subsampling_where_that_can_be(subsampling: str, kept: int):
    data = quarters("JPEG", 6, subsampling=subsampling)
    assert get_sampling(decoded(read_picture(data, 10**6).data)) == kept


def test_an_orientation_that_cannot_be_read_or_means_nothing_is_upright():
    broken = quarters("JPEG", 6).replace(b"Exif\0\0MM", b"Exif\0\0XX")
    for data in (quarters("JPEG", 9), quarters("JPEG", 0), broken):
        assert read_picture(data, 10**6) == (data, ())
