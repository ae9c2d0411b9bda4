import base64
import errno
import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import get_sampling

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs import images as images_module
from stream_engine.inputs.images import decode_base64, read_image_file
from stream_engine.pictures import check_image, check_size, turned_upright
from stream_engine.store.transient import WAITS_S
from tests.samples import picture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def reason_of(call, *arguments) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    return caught.value.reason


@pytest.mark.parametrize("format", FORMATS)
def test_whole_images_pass(format: str):
    check_image(picture(3, format, size=(120, 80)), max_pixels=120 * 80)


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_cut_anywhere_is_refused(format: str):
    data = picture(3, format, size=(64, 48))
    pad = 1 if format == "GIF" else 0  # the last byte of a GIF says only that it ends
    for size in range(0, len(data) - pad, 7):
        reason = reason_of(check_image, data[:size], 10**6)
        assert reason in ("truncated_image", "undecodable_image")
    assert reason_of(check_image, data[: len(data) * 2 // 3], 10**6) == "truncated_image"


def test_a_progressive_jpeg_cut_between_its_scans_is_refused():
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    check_image(data, 10**6)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(scans) > 2
    assert reason_of(check_image, data[: scans[-1]], 10**6) == "truncated_image"


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
    assert reason_of(check_image, data, 10**6) == "undecodable_image"


def test_a_flipped_bit_in_a_png_is_noticed():
    data = bytearray(picture(3, size=(64, 64)))
    data[len(data) // 2] ^= 1
    with pytest.raises(RecordError):
        check_image(bytes(data), 10**6)


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
        assert reason_of(check_image, bomb(*size), 10**6) == "image_too_large"


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
    assert reason_of(check_image, bomb(3000, 10), 10**6) == "image_too_long"


def deep_picture(mode: str, format: str) -> bytes:
    """A ramp from 0 to 60000, as a depth camera or a scanner stores it."""
    ramp = np.linspace(0, 60_000, 24 * 16).reshape(16, 24)
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(dtype)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "format"),
    [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("I;16", "PPM")],
)
def test_pixels_that_would_turn_white_are_refused(mode: str, format: str):
    """Pillow makes RGB of them by cutting off at 255: they reached the models as blank sheets."""
    data = deep_picture(mode, format)
    with pytest.raises(RecordError, match="scale them to 8 bits") as caught:
        check_image(data, 10**6)
    assert caught.value.reason == "unsupported_pixel_depth"


def test_sixteen_bits_in_three_channels_pass():
    """Pillow reads these as 8 bits by their upper bytes."""
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = png(header, b"\0" + bytes([200, 0] * 6))
    check_image(data, 10**6)
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
    assert check_image(data, 10**6) == (orientation == 1)
    seen = ImageOps.exif_transpose(decoded(data)).convert("RGB")
    stored = decoded(turned_upright(data))
    assert stored.format == format
    assert not stored.getexif()
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
    assert get_sampling(decoded(turned_upright(data))) == kept


def test_an_orientation_that_cannot_be_read_or_means_nothing_is_upright():
    assert check_image(quarters("JPEG", 9), 10**6)
    assert check_image(quarters("JPEG", 0), 10**6)
    broken = quarters("JPEG", 6).replace(b"Exif\0\0MM", b"Exif\0\0XX")
    assert check_image(broken, 10**6)


def test_base64_with_prefix_and_line_breaks_is_read():
    text = base64.encodebytes(picture(1)).decode()
    assert decode_base64(text) == picture(1)
    assert decode_base64(f"data:image/png;base64,{text}") == picture(1)


@pytest.mark.parametrize("text", ["not base64!", "abc", "QUJD*EFG", "ümlaut=="])
def test_broken_base64_is_named(text: str):
    assert reason_of(decode_base64, text) == "bad_base64"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A folder of rows, with an image root in it, and a secret beside the root."""
    root = tmp_path / "rows/images"
    root.mkdir(parents=True)
    (root / "a.png").write_bytes(b"inside")
    (tmp_path / "rows/secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "rows/secret.png")
    (root / "good-link.png").symlink_to(root / "a.png")
    (root / "out").symlink_to(tmp_path / "rows")
    (tmp_path / "rows/images-2").mkdir()
    (tmp_path / "rows/images-2/b.png").write_bytes(b"secret")
    return str(tmp_path / "rows"), str(root)


def read(path: str, folder: str, root: str | None, max_pixels: int = 10**6) -> bytes:
    return read_image_file(path, folder, root, max_pixels)


def test_paths_inside_the_root_are_read(folders):
    folder, root = folders
    for path in ("a.png", "images/a.png", "good-link.png", "out/images/a.png", f"{root}/a.png"):
        assert read(path, folder, root) == b"inside"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "secret.png",
        "link.png",
        "images/link.png",
        "out/secret.png",
        "../images-2/b.png",
        "images-2/b.png",
        "/etc/hostname",
        "../../../../../../../../etc/hostname",
        "../no-such-file.png",
    ],
)
def test_paths_that_leave_the_root_are_rejected(folders, path: str):
    folder, root = folders
    assert reason_of(read, path, folder, root) == "path_outside_root"


def test_without_a_root_paths_may_point_anywhere(folders, tmp_path: Path):
    folder, root = folders
    assert read("secret.png", folder, None) == b"secret"
    assert read("../rows/secret.png", folder, None) == b"secret"
    assert read(f"{root}/link.png", folder, None) == b"secret"


@pytest.mark.parametrize(
    "path", ["no.png", "a.png/b.png", "x" * 300, "a\0b.png", "s3://bucket/a.png", "."]
)
def test_files_that_are_not_there_are_missing(folders, path: str):
    _, root = folders
    assert reason_of(read, path, root, root) == "missing_image_file"
    assert reason_of(read, path, root, None) == "missing_image_file"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited; no time passes."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_an_image_that_cannot_be_reached_now_is_tried_again(folders, waits, monkeypatch, code):
    """A disk that stumbled made `missing_image_file` of pictures that were there."""
    folder, root = folders
    read_file, failures = images_module.read_regular_file, [OSError(code, os.strerror(code))] * 2

    def stumbling(path: str, max_bytes: int) -> bytes:
        if failures:
            raise failures.pop()
        return read_file(path, max_bytes)

    monkeypatch.setattr(images_module, "read_regular_file", stumbling)
    assert read("a.png", folder, root) == b"inside"
    assert waits == list(WAITS_S[:2])
    failures += [OSError(code, os.strerror(code))] * 9
    with pytest.raises(RecordError, match=r"a\.png: .*retry-failed") as caught:
        read("a.png", folder, root)
    assert caught.value.reason == "unreachable_image"


def test_an_image_that_is_not_there_is_not_waited_for(folders, waits):
    folder, root = folders
    assert reason_of(read, "no.png", folder, root) == "missing_image_file"
    assert waits == []


def test_a_pipe_is_not_waited_for(folders):
    folder, root = folders
    os.mkfifo(f"{root}/pipe.png")
    assert reason_of(read, "pipe.png", folder, root) == "missing_image_file"


def test_a_huge_file_is_refused_before_it_is_read(folders):
    folder, root = folders
    with open(f"{root}/huge.png", "wb") as file:
        file.truncate(10**12)
    assert reason_of(read, "huge.png", folder, root) == "image_too_large"
