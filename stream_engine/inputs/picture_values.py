"""What stands in a picture's place: bytes, base64, a data URL, a path, a file URL, a dict of these.

Every form in use is read, and any other is a reject: a picture is never left out in silence.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from stream_engine.errors import RecordError
from stream_engine.inputs.cells import (
    as_list,
    as_records,
    check_unicode,
    from_text,
    is_missing,
    text_of,
)
from stream_engine.run_dir.shards import UNKNOWN_EXTENSION, image_extension

DATA_KEYS = ("bytes", "b64_json", "base64", "data")
PATH_KEYS = ("path", "file_name", "filename", "src")
NESTED_KEYS = ("image", "image_url", "url")
"""Of a dict: what holds the encoded picture, where it lies, and what is a picture of any form."""

MAX_PATH = 4096
NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=_\-\s]")
REMOTE = re.compile(r"(https?|ftp)://", re.IGNORECASE)
URL = re.compile(r"file:|data:|\w+://", re.IGNORECASE)
MAX_BARE_PATH = 100
"""Of a text that may be either: what is longer and decodes as base64 was meant as such."""


class PictureValue(NamedTuple):
    """A picture's encoded bytes, or where they lie; `path` alone may also be its name."""

    data: bytes | None
    path: str
    may_be_base64: bool = False
    """The text decodes as base64, but not to a picture: it is one or the other, broken."""


def pictures_in(value: Any) -> list[Any]:
    """A value, a list of values (also as text), or nothing, as a list.

    Empty stand-ins for "no picture" are nothing, as is a list of such alone; among pictures they
    stay, to be rejected.
    """
    value = as_records(as_list(value))
    if isinstance(value, (list, tuple)):
        return [] if all(map(is_nothing, value)) else list(value)
    return [] if is_nothing(value) else [value]


def is_nothing(value: Any) -> bool:
    """Whether a value says that there is no picture: null, a blank text, a dict of these.

    A dict with bytes of which there are none is a picture that was lost.
    """
    if is_missing(value):
        return True
    if isinstance(value, dict):
        known = all(name in (*DATA_KEYS, *PATH_KEYS, *NESTED_KEYS) for name in value)
        return known and all(is_nothing(one) and one != b"" for one in value.values())
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (bytes, list)) and not value


def parse_picture(value: Any) -> PictureValue:
    """The one form of a picture's value.

    Raises:
        RecordError: unknown_image_form, bad_base64, remote_image or invalid_text.
    """
    found = parse_form(value)
    check_unicode(found.path, "image")
    return found


def is_encoded(value: Any) -> bool:
    """Whether a value holds a picture's bytes, in whatever form, and does not only name one."""
    try:
        return parse_form(value).data is not None
    except RecordError:
        return False


def parse_form(value: Any) -> PictureValue:
    """The same, of whatever path."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return PictureValue(bytes(value), "")
    value = from_text(value, "{}")
    if isinstance(value, str):
        return parse_text(value)
    if isinstance(value, dict):
        return parse_dict(value)
    shown = "null" if is_missing(value) else type(value).__name__
    raise RecordError("unknown_image_form", f"{shown} stands in a picture's place")


def parse_dict(value: dict[str, Any]) -> PictureValue:
    """A picture as `datasets`, OpenAI's messages and others write it."""
    path = next((text_of(value[k], k) for k in PATH_KEYS if not is_missing(value.get(k))), "")
    for key in DATA_KEYS:
        data = value.get(key)
        if isinstance(data, str) and data:
            return PictureValue(decode_base64(data), path)
        if isinstance(data, (bytes, bytearray, memoryview)) and (len(data) or not path):
            return PictureValue(bytes(data), path)
    for key in NESTED_KEYS:
        if isinstance(value.get(key), (str, bytes, dict)) and value[key]:
            found = parse_form(value[key])
            return found._replace(path=found.path or path)
    if path:
        return parse_text(path) if URL.match(path) else PictureValue(None, path)
    raise RecordError("unknown_image_form", f"a dict of {', '.join(map(repr, value)) or 'nothing'}")


def parse_text(text: str) -> PictureValue:
    """A text in a picture's place: a data URL, a file URL, base64 or a path."""
    if not text.strip():
        raise RecordError("unknown_image_form", "an empty text stands in a picture's place")
    if text[:5].lower() == "data:":
        return PictureValue(data_url(text), "")
    if REMOTE.match(text):
        return PictureValue(None, text)
    if text[:5].lower() == "file:":
        return PictureValue(None, path_of_url(text))
    if len(text) > MAX_PATH:
        return PictureValue(decode_base64(text), "")
    if NOT_BASE64.search(text):
        return PictureValue(None, text)
    if "\n" in text.strip():
        return PictureValue(decode_base64(text), "")
    try:
        data = decode_base64(text)
    except RecordError:
        return PictureValue(None, text)
    if image_extension(data) != UNKNOWN_EXTENSION:
        return PictureValue(data, "")
    return PictureValue(None, text, may_be_base64=len(text) > MAX_BARE_PATH or text.endswith("="))


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 string, standard or URL-safe, with or without a `data:` prefix, line
    breaks and padding."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    text = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("bad_base64", str(error)) from error


def data_url(text: str) -> bytes:
    """The bytes of a data URL (RFC 2397)."""
    head, _, body = text.partition(",")
    if head.lower().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(body))
    return urllib.parse.unquote_to_bytes(body)


def path_of_url(text: str) -> str:
    """The path of a `file:` URL of this machine."""
    parsed = urllib.parse.urlsplit(text)
    if parsed.netloc not in ("", "localhost"):
        raise RecordError(
            "remote_image",
            f"{text} lies on the host {parsed.netloc}; a file of this machine is a path, or "
            "file:///path",
        )
    return urllib.parse.unquote(text.partition(":")[2].removeprefix("//" + parsed.netloc))


def spellings(path: str) -> Iterator[str]:
    """A path as written, and as other systems write it: composed or decomposed, slashes turned,
    percent-encoded, its suffix in capitals or not, `~` for the home folder.

    White space at its ends, which a list of paths may leave, is tried without."""
    yield path
    names = list(dict.fromkeys((path, path.strip())))
    names += [urllib.parse.unquote(name) for name in names]
    names += [os.path.expanduser(name) for name in names]
    if "\\" in path:
        names += [re.sub(r"^[A-Za-z]:", "", name).replace("\\", "/") for name in names]
    for form in ("NFC", "NFD"):
        names += [unicodedata.normalize(form, name) for name in names]  # type: ignore[arg-type]
    for stem, suffix in map(os.path.splitext, list(names)):
        names += [stem + suffix.lower(), stem + suffix.upper()]
    yield from dict.fromkeys(names)
