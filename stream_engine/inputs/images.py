"""Images of an input row: found, fenced in, and checked by decoding them once.

Their bytes are kept as they are, but for pictures that a tag says to turn (EXIF orientation): those
are stored upright and without the tag, since some readers obey it and others do not. Every problem
is a RecordError with one of the reasons missing_image_file, unreachable_image, path_outside_root,
bad_base64, image_too_large, image_too_long, unsupported_pixel_depth, truncated_image,
undecodable_image.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import posixpath
import stat

import fsspec

from stream_engine.errors import RecordError
from stream_engine.store.locations import is_url, store_errors
from stream_engine.store.transient import WAITS_S, is_transient, patiently

MAX_BYTES_PER_PIXEL = 8
"""No encoding of a picture needs more: 16 bits in four channels."""


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 string, with or without a `data:` prefix and line breaks."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("bad_base64", str(error)) from error


def read_image_file(path: str, folder: str, image_root: str | None, max_pixels: int) -> bytes:
    """The bytes of the image that a row in `folder` names.

    A relative path is looked up in `image_root` first, when there is one, then in `folder`. The
    file that is found must lie in `image_root`, after all links and `..` are followed.
    """
    if is_url(folder):
        return read_remote_image(path, folder, image_root)
    if is_url(path):
        raise RecordError("missing_image_file", f"{path} is in another store than its row")
    if "\0" in path:
        raise RecordError("missing_image_file", "the path holds a null character")
    candidates = [os.path.join(base, path) for base in (image_root, folder) if base is not None]
    found = next((name for name in candidates if os.path.lexists(name)), candidates[0])
    if image_root is not None and not is_inside(os.path.realpath(found), image_root):
        raise RecordError("path_outside_root", f"{path} is not inside {image_root}")
    try:
        return patiently(lambda: read_regular_file(found, max_pixels * MAX_BYTES_PER_PIXEL))
    except OSError as error:
        raise not_read(found, error, error.strerror or str(error)) from error


def read_regular_file(path: str, max_bytes: int) -> bytes:
    """The bytes of a file that is no pipe or device, and not larger than an image can be."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise RecordError("missing_image_file", f"{path} is not a regular file")
    if status.st_size > max_bytes:
        raise RecordError("image_too_large", f"{path} has {status.st_size} bytes")
    with open(path, "rb") as file:
        return file.read()


def not_read(path: str, error: Exception, detail: str) -> RecordError:
    """The reject for an image that is not there, or was not to be had just now."""
    if not is_transient(error):
        return RecordError("missing_image_file", f"{path}: {detail}")
    return RecordError(
        "unreachable_image",
        f"{path}: {detail} (tried {len(WAITS_S) + 1} times); "
        "`stream-engine retry-failed` reads its input again",
    )


def is_inside(real_path: str, root: str) -> bool:
    """Whether a path without links lies in a folder."""
    real_root = os.path.realpath(root)
    return os.path.commonpath([real_path, real_root]) == real_root


def read_remote_image(path: str, folder: str, image_root: str | None) -> bytes:
    """The bytes of an image in the store of the file that names it; stores have no links."""
    protocol, _, _ = folder.partition("://")
    if is_url(path) and not path.startswith(f"{protocol}://"):
        raise RecordError("missing_image_file", f"{path} is in another store than its row")
    candidates = [join_url(base, path) for base in (image_root, folder) if base is not None]
    if image_root is not None:
        if not is_url(image_root):
            raise RecordError("path_outside_root", f"{path} is not inside {image_root}")
        fence = join_url(image_root, "") + "/"
        candidates = [url for url in candidates if url.startswith(fence)]
        if not candidates:
            raise RecordError("path_outside_root", f"{path} is not inside {image_root}")
    for url in candidates:
        fs, name = fsspec.core.url_to_fs(url)
        try:
            return patiently(functools.partial(fs.cat_file, name))
        except FileNotFoundError:
            continue
        except store_errors() as error:
            raise not_read(url, error, str(error)) from error
    raise RecordError("missing_image_file", f"{candidates[0]} does not exist")


def join_url(base: str, path: str) -> str:
    """A path below a URL, `.` and `..` followed."""
    if is_url(path):
        base, path = path, ""
    protocol, _, rest = base.partition("://")
    return f"{protocol}://" + posixpath.normpath(posixpath.join("/", rest, path)).lstrip("/")
