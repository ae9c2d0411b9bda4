"""Pictures as bytes: checked by decoding them once, made plain, and what Pillow makes of them.

What is stored of a picture is what everybody sees: `convert("RGB")`, a browser and a model agree on
it. A picture of which they would not (transparent, turned by EXIF, 16 bits deep, CMYK, animated) is
encoded anew when it is read, once; all others keep their bytes.

The only module that opens Pillow on foreign bytes. Knows no row and no file: those are found and
fenced in by inputs/images.py. Every problem is a RecordError with one of the reasons
image_too_large, image_too_long, unsupported_pixel_depth, truncated_image, damaged_image,
undecodable_image.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from typing import NamedTuple

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import get_sampling

from stream_engine.errors import RecordError
from stream_engine.text import HEAD_BYTES, not_the_file

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's other formats are refused: some of them run programs (EPS) or are no pictures."""

MAX_SQUARE = 2
"""Of max_pixels, for a square of the longer side, to which several models pad: 18918 pixels long by
default, where a telephone's panorama has 16384."""

MAX_ASPECT = 200
"""A side in terms of the other. Models that bring the short side to a fixed length make the long
one as many times longer; Qwen2-VL's processor has the same limit."""

UNREAD_FORMATS = {
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC",
    rb"\xff\x0a|....JXL ": "JPEG XL",
    rb"\s*(<\?xml[^>]*>\s*)?<svg": "SVG",
    rb"%PDF": "PDF",
    rb"8BPS": "a Photoshop file",
    rb"....ftyp": "a video",
}
"""How other formats begin, as patterns -> what they are."""

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

CHANGES = {
    "first_frame": "animated or of several pages: the first one was taken",
    "turned": "turned upright, as their EXIF orientation says",
    "depth": "16 bits deep: brought to 8",
    "colours": "in CMYK or other colours: brought to RGB",
    "transparency": "transparent: put on white",
}
"""What is done to pictures when they are read, in words."""

FOREIGN_COLOURS = frozenset(("CMYK", "YCbCr", "LAB", "HSV"))
JPEG_FORMATS = ("JPEG", "MPO")

DAMAGE = re.compile(r"premature end|bad Huffman|instead of RST", re.IGNORECASE)
"""libjpeg-turbo's warnings (jerror.h) of data that it could not read and guessed."""
SURPLUS_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0x(?:d\d|c4|da)")
MAX_SURPLUS_BYTES = 8
"""Before a mark in or behind the pixels; some cameras pad. More: decoding lost its way there."""

JPEG_QUALITY = 95
SMALL_JPEG_QUALITY = 85
MAX_SHRUNK_PIXELS = 178_956_970
"""Of a picture that is made small; Pillow's own limit, beyond which it warns of bombs."""
MAX_SHARP_PIXELS = 64 * 64
"""Of a small picture that is encoded without loss: the pixels of icons and drawings count."""
HALF_WIDTH_SAMPLING = 1
"""Pillow's number for 4:2:2, which a quarter turn makes 4:4:0; that it cannot write."""


class Picture(NamedTuple):
    """A picture as it is stored, and what was done to it (of CHANGES); () when nothing was."""

    data: bytes
    changes: tuple[str, ...]


class SmallPicture(NamedTuple):
    """A picture made for a screen; sizes in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def small_picture(data: bytes, *, longest: int, is_lossless: bool = False) -> SmallPicture:
    """A stored picture with no side over `longest` pixels, encoded anew and without its metadata.

    Raises:
        RecordError: where it cannot be decoded.
    """
    image = shrunk(data, longest)
    buffer = io.BytesIO()
    if is_lossless or image.width * image.height <= MAX_SHARP_PIXELS:
        image.save(buffer, "PNG")
        return SmallPicture(buffer.getvalue(), "png", *image.size)
    image.save(buffer, "JPEG", quality=SMALL_JPEG_QUALITY)
    return SmallPicture(buffer.getvalue(), "jpg", *image.size)


def pixels_of(data: bytes, *, longest: int) -> list[list[tuple[int, int, int]]]:
    """A stored picture's rows of red, green and blue, with no side over `longest` pixels.

    Raises:
        RecordError: where it cannot be decoded.
    """
    image = shrunk(data, longest)
    values = image.tobytes()
    pixels = list(zip(values[::3], values[1::3], values[2::3]))
    return [pixels[i : i + image.width] for i in range(0, len(pixels), image.width)]


def shrunk(data: bytes, longest: int) -> Image.Image:
    """A picture in RGB with no side over `longest` pixels; a large JPEG is decoded at a fraction.

    Raises:
        RecordError: where it cannot be decoded, or has more pixels than MAX_SHRUNK_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                check_size(*image.size, MAX_SHRUNK_PIXELS)
                image.draft("RGB", (2 * longest, 2 * longest))
                image.load()
                if image.mode.startswith(("I", "F")):
                    check_depth(image)
                shown = eight_bits(upright(image)).convert("RGB")
    except Image.DecompressionBombError as error:
        raise RecordError("image_too_large", str(error)) from error
    except DECODE_ERRORS as error:
        raise RecordError("undecodable_image", str(error)) from error
    shown.thumbnail((longest, longest))
    return shown


def read_picture(data: bytes, max_pixels: int) -> Picture:
    """Decode a picture completely and make it plain.

    The size is read from the header first, so that a bomb is refused before it is decoded. A JPEG
    is decoded at an eighth of its size: all of its data is read, in a fraction of the time.

    Raises:
        RecordError: when it cannot be decoded to its end, is damaged, or is too large.
    """
    is_identified = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                is_identified = True
                check_size(*image.size, max_pixels)
                is_read = image.format in JPEG_FORMATS and check_jpeg(data)
                if is_read:
                    changes = changes_of(image)
                if image.format == "PNG":
                    image.verify()  # checksums and the end chunk, which decoding skips
            if not is_read:
                with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                    image.load()
                    changes = changes_of(image)
            return Picture(encoded_anew(data) if changes else data, changes)
    except Image.DecompressionBombError as error:
        raise RecordError("image_too_large", str(error)) from error
    except DECODE_ERRORS as error:
        is_cut = looks_cut(data, error, is_identified)
        reason = "truncated_image" if is_cut else "undecodable_image"
        raise RecordError(reason, str(error) if is_identified else what_else(data)) from error


def what_else(data: bytes) -> str:
    """What stands in the place of a picture of a known format."""
    if not data:
        return "there is nothing: the file, or the cell, is empty"
    kind = next((name for begin, name in UNREAD_FORMATS.items() if re.match(begin, data)), "")
    return (
        not_the_file(data[:HEAD_BYTES])
        or (f"{kind}, which is not read" if kind else "")
        or f"no picture of a known format, it begins {data[:16]!r}"
    )


def check_jpeg(data: bytes) -> bool:
    """Whether all data of a JPEG were read; what cannot be converted (CMYK) is left to Pillow.

    Raises:
        RecordError: where libjpeg mends by guessing, and half of the picture turns grey. Pillow
            takes such a one without a word.
    """
    import simplejpeg  # libjpeg-turbo with its warnings as errors

    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=1, strict=True)
    except ValueError as error:
        message = str(error)
        if "Premature end of JPEG file" in message:
            raise RecordError("truncated_image", message) from error
        surplus = SURPLUS_BYTES.search(message)
        if DAMAGE.search(message) or (surplus and int(surplus[1]) > MAX_SURPLUS_BYTES):
            raise RecordError("damaged_image", message) from error
        return False
    return True


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


def changes_of(image: Image.Image) -> tuple[str, ...]:
    """What makes a picture plain, of CHANGES; it is loaded, or a JPEG.

    Raises:
        RecordError: for pixels whose range nobody but the user knows.
    """
    depth = image.mode if image.mode.startswith(("I", "F")) else ""
    if depth:
        check_depth(image)
    is_present = {
        "first_frame": getattr(image, "is_animated", False) and image.format != "MPO",
        "turned": orientation_of(image) in TURNS,
        "depth": bool(depth),
        "colours": image.mode in FOREIGN_COLOURS,
        "transparency": is_transparent(image),
    }
    return tuple(name for name in CHANGES if is_present[name])


def check_depth(image: Image.Image) -> None:
    """Raise RecordError for floats and 32-bit integers, whose black and white are not told."""
    if image.mode == "F" or (image.mode == "I" and not fits_16_bits(image)):
        raise RecordError(
            "unsupported_pixel_depth",
            f"{image.mode} pixels (32 bits, or floats) have no black and white of their own; "
            "scale them to 8 bits, which only you know how to do",
        )


def fits_16_bits(image: Image.Image) -> bool:
    """Whether a picture of 32-bit integers holds 16-bit ones, as Pillow reads some formats."""
    low, high = image.getextrema()
    return image.format in ("PNG", "PPM") and low >= 0 and high < 1 << 16  # type: ignore[operator]


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixel of a loaded image lets through what lies behind it."""
    if not image.has_transparency_data:
        return False
    alpha = image if image.mode in ("RGBA", "LA", "PA") else image.convert("RGBA")
    lowest, _ = alpha.getchannel("A").getextrema()
    return lowest < 255  # type: ignore[operator]


def plain(image: Image.Image) -> Image.Image:
    """A loaded image upright, of 8 bits, in a mode that `convert("RGB")` only spreads out."""
    image = eight_bits(upright(image))
    if is_transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits as 8: the highest bits that the picture uses, as viewers scale it.

    Pillow's own way to RGB cuts off at 255: a depth map or a scan becomes a white sheet.
    """
    if not image.mode.startswith("I"):
        return image
    grey = image.convert("I")
    _, high = grey.getextrema()
    shift = max(0, int(high).bit_length() - 8)  # type: ignore[arg-type]
    return grey.point(lambda value: value * (1 / (1 << shift))).convert("L")


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


def encoded_anew(data: bytes) -> bytes:
    """A picture made plain, its first frame, without EXIF and XMP data.

    A JPEG stays one, of quality 95 and with its own subsampling of colours (full colours where
    its halves would change sides); all others are encoded without loss.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        image.load()
        shown = plain(image)
        is_same_space = image.mode not in FOREIGN_COLOURS and not image.mode.startswith("I")
        profile = image.info.get("icc_profile") if is_same_space else None
        buffer = io.BytesIO()
        if image.format in JPEG_FORMATS:
            sampling = get_sampling(image)
            if sampling == HALF_WIDTH_SAMPLING or sampling < 0:
                sampling = 0
            shown.save(
                buffer, "JPEG", quality=JPEG_QUALITY, subsampling=sampling, icc_profile=profile
            )
        elif image.format == "WEBP":
            shown.save(buffer, "WEBP", lossless=True, exact=True, icc_profile=profile)
        else:
            shown.save(buffer, "PNG", icc_profile=profile)
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
    if decoded.mode.startswith(("I", "F")):
        check_depth(decoded)
    return eight_bits(upright(decoded))
