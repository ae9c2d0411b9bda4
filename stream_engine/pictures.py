"""Pictures as bytes: checked by decoding them once, turned upright, and what Pillow makes of them.

The only module that opens Pillow on foreign bytes. Knows no row and no file: those are found and
fenced in by inputs/images.py. Every problem is a RecordError with one of the reasons
image_too_large, image_too_long, unsupported_pixel_depth, truncated_image, undecodable_image.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import get_sampling

from stream_engine.errors import RecordError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's other formats are refused: some of them run programs (EPS) or are no pictures."""

MAX_SQUARE = 2
"""Of max_pixels, for a square of the longer side, to which several models pad: 18918 pixels long by
default, where a telephone's panorama has 16384."""

MAX_ASPECT = 200
"""A side in terms of the other. Models that bring the short side to a fixed length make the long
one as many times longer; Qwen2-VL's processor has the same limit."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,  # Pillow's for broken PNG chunks
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on hostile bytes."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation; the others are upright."""

JPEG_QUALITY = 95
HALF_WIDTH_SAMPLING = 1
"""Pillow's number for 4:2:2, which a quarter turn makes 4:4:0; that it cannot write."""


def check_image(data: bytes, max_pixels: int) -> bool:
    """Decode an image completely, and raise RecordError when that fails or it is too large.

    Returns whether it is upright; `turned_upright` makes it so. The size is read from the header
    first, so that a bomb is refused before it is decoded. JPEG is decoded at an eighth of its size:
    all of its data is read, in a fraction of the time.
    """
    is_identified = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                is_identified = True
                check_size(*image.size, max_pixels)
                check_depth(image)
                if image.format == "PNG":
                    image.verify()  # checksums and the end chunk, which decoding skips
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                image.draft("RGB", (1, 1))
                image.load()
                return orientation_of(image) not in TURNS
    except Image.DecompressionBombError as error:
        raise RecordError("image_too_large", str(error)) from error
    except DECODE_ERRORS as error:
        is_cut = looks_cut(data, error, is_identified)
        reason = "truncated_image" if is_cut else "undecodable_image"
        detail = "not an image in a known format" if not is_identified else str(error)
        raise RecordError(reason, detail) from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise RecordError for a picture that takes too much memory as it is, padded or resized."""
    longer, shorter = max(width, height), max(1, min(width, height))
    if width * height > max_pixels:
        raise RecordError(
            "image_too_large", f"{width} x {height} pixels, the limit is {max_pixels}"
        )
    if longer**2 > MAX_SQUARE * max_pixels or longer > MAX_ASPECT * shorter:
        longest = min(int((MAX_SQUARE * max_pixels) ** 0.5), MAX_ASPECT * shorter)
        raise RecordError(
            "image_too_long",
            f"{width} x {height} pixels: models pad or resize it to a multiple of that; with a "
            f"shorter side of {shorter} the longer one may have {longest}; crop or shrink it",
        )


def check_depth(image: Image.Image) -> None:
    """Raise RecordError for pixels of more than 8 bits, which no model's front end can show.

    Pillow cuts them off at 255 on the way to RGB: a depth map or a scan becomes a white sheet.
    """
    if image.mode.startswith("I") or image.mode == "F":
        raise RecordError(
            "unsupported_pixel_depth",
            f"{image.mode} pixels (16 or 32 bits, or floats) would all turn white or black as RGB; "
            "scale them to 8 bits, which only you know how to do",
        )


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image; 1, upright, where that cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1


def upright(image: Image.Image) -> Image.Image:
    """A loaded image as its EXIF orientation says that it is to be seen."""
    turn = TURNS.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def turned_upright(data: bytes) -> bytes:
    """An image that `check_image` passed, encoded anew: upright, without its EXIF and XMP data.

    A JPEG stays one, of quality 95 and with its own subsampling of colours (full colours where
    its halves would change sides); all others are encoded without loss.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        image.load()
        profile = image.info.get("icc_profile")
        buffer = io.BytesIO()
        if image.format in ("JPEG", "MPO"):
            sampling = get_sampling(image)
            if sampling == HALF_WIDTH_SAMPLING or sampling < 0:
                sampling = 0
            upright(image).save(
                buffer, "JPEG", quality=JPEG_QUALITY, subsampling=sampling, icc_profile=profile
            )
        elif image.format == "WEBP":
            upright(image).save(buffer, "WEBP", lossless=True, exact=True, icc_profile=profile)
        else:
            upright(image).save(buffer, "PNG", icc_profile=profile)
    return buffer.getvalue()


def looks_cut(data: bytes, error: Exception, is_identified: bool) -> bool:
    """Whether a decoding error means that the end of the image is missing."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    message = str(error).lower()
    return is_identified and (
        isinstance(error, (EOFError, struct.error))
        or any(sign in message for sign in ("truncated", "broken data stream", "unexpected end"))
    )


def decode_image(data: bytes, path: str) -> Image.Image:
    """Decode an image fully, turned as its EXIF orientation says (ingest stores none).

    Raises:
        RecordError: where Pillow cannot, or its pixels do not become RGB.
    """
    try:
        decoded = Image.open(io.BytesIO(data))
        decoded.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecordError("undecodable_image", f"{path}: {error}") from error
    check_depth(decoded)
    return upright(decoded)
