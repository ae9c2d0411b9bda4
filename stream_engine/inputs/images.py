"""Pictures of an input row by path: found, and fenced in.

Every problem is a RecordError with one of the reasons missing_image_file, unreachable_image,
path_outside_root, remote_image, image_too_large.
"""

from __future__ import annotations

import functools
import os
import posixpath
import stat

import fsspec

from stream_engine.errors import ConfigError, RecordError
from stream_engine.inputs.picture_values import REMOTE, spellings
from stream_engine.store.locations import is_url, store_errors
from stream_engine.store.transient import WAITS_S, is_transient, patiently

MAX_BYTES_PER_PIXEL = 8
"""No encoding of a picture needs more: 16 bits in four channels."""


def read_image_file(
    path: str, folder: str, image_root: str | None, max_pixels: int, *, follow_links: bool = False
) -> bytes:
    """The bytes of the image that a row in `folder` names.

    A relative path is looked up in `image_root` first, when there is one, then in `folder`; as it
    is written, then as other systems write it (see `spellings`). The file that is found must lie in
    `image_root`, after all links and `..` are followed; with `follow_links`, only `..` is, so that
    links inside may lead anywhere.
    """
    if is_url(folder):
        return read_remote_image(path, folder, image_root)
    if "://" in path:
        raise remote(path)
    if "\0" in path:
        raise RecordError("missing_image_file", "the path holds a null character")
    bases = [base for base in (image_root, folder) if base is not None]
    candidates = (os.path.join(base, name) for name in spellings(path) for base in bases)
    as_written = os.path.join(bases[0], path)
    found = next((name for name in candidates if os.path.lexists(name)), as_written)
    if image_root is not None:
        check_fence(found, path, image_root, follow_links=follow_links)
    try:
        return patiently(lambda: read_regular_file(found, max_pixels * MAX_BYTES_PER_PIXEL))
    except OSError as error:
        detail = error.strerror or str(error)
        raise not_read(found, error, detail + elsewhere(path, bases)) from error


def check_root(root: str | None) -> None:
    """Raise ConfigError for an image root on disk that is no folder: no row would be read."""
    if root is not None and not is_url(root) and not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ConfigError(f"image_root {root!r} {what}")


def check_fence(found: str, path: str, root: str, *, follow_links: bool) -> None:
    """Raise RecordError for a file outside the image root; names the link that leads there."""
    real_root = os.path.realpath(root)
    if is_below(os.path.realpath(found), real_root):
        return
    lexical = os.path.normpath(os.path.abspath(found))
    if not is_below(lexical, os.path.abspath(root)) and not is_below(lexical, real_root):
        raise RecordError("path_outside_root", f"{path} is not inside {root}")
    if follow_links and ".." not in path.split("/"):
        return
    link = lexical
    for part in parents_up_to(lexical, os.path.abspath(root)):
        if os.path.islink(part):
            link = part
    raise RecordError(
        "path_outside_root",
        f"{path}: {link} is a link to {os.path.realpath(link)}, outside of {root}; "
        "--follow_links allows links there",
    )


def parents_up_to(path: str, root: str) -> list[str]:
    """A path and the folders above it, below the root."""
    parents = []
    while len(path) > len(root):
        parents.append(path)
        path = os.path.dirname(path)
    return parents


def is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def elsewhere(path: str, bases: list[str]) -> str:
    """Where a file that was not found lies after all: relative to the folder one runs from."""
    if os.path.isabs(path):
        return ""
    looked = " and ".join(bases)
    if any(os.path.exists(name) for name in spellings(path)):
        return f" (looked in {looked}; it is there from where you run: give --image_root .)"
    return f" (looked in {looked})"


def remote(path: str) -> RecordError:
    """The reject of a picture that is not on the disk of its row."""
    if REMOTE.match(path):
        detail = f"{path} is on the web; download the pictures first (img2dataset does)"
    else:
        detail = f"{path} is in another store than its row"
    return RecordError("remote_image", detail)


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


def read_remote_image(path: str, folder: str, image_root: str | None) -> bytes:
    """The bytes of an image in the store of the file that names it; stores have no links."""
    protocol, _, _ = folder.partition("://")
    if is_url(path) and not path.startswith(f"{protocol}://"):
        raise remote(path)
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
