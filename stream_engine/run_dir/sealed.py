"""Files that carry their own checksum: a byte that changed is told from the file alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.text import describe

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECKSUM = "checksum"
DIGEST_BYTES = hashlib.sha256().digest_size


def with_digest(body: bytes) -> bytes:
    """Any bytes, after the SHA-256 of them."""
    return hashlib.sha256(body).digest() + body


def checked(data: bytes) -> bytes | None:
    """What `with_digest` was given; None when the bytes are not what was written."""
    body = data[DIGEST_BYTES:]
    return body if with_digest(body) == data else None


def read_derived(path: Location, magic: bytes, kind: type[T]) -> T | None:
    """What `keep_derived` was given; None when there is nothing, or it cannot be read."""
    try:
        data = files.read_bytes(path) or b""
    except OSError as error:
        logger.warning("%s; it is made again", describe(error))
        return None
    if not data.startswith(magic):
        return None
    try:
        return msgspec.msgpack.decode(checked(data[len(magic) :]) or b"", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def keep_derived(path: Location, magic: bytes, content: Any) -> None:
    """Put what can be made again in the place of what is there, behind a mark of its kind.

    It need not outlast a power cut.

    Raises:
        ChangedError: when another process puts one there.
        OSError: when it cannot be written.
    """
    data = magic + with_digest(msgspec.msgpack.encode(content))
    files.replace(path, data, files.version_of(path), durable=False)


def sealed(content: Mapping[str, Any]) -> bytes:
    """An object as such a file holds it."""
    body = {name: value for name, value in content.items() if name != CHECKSUM}
    checksum = hashlib.sha256(msgspec.json.encode(body)).hexdigest()
    encoded = msgspec.json.encode({**body, CHECKSUM: checksum})
    return msgspec.json.format(encoded, indent=2) + b"\n"


def read_sealed(path: Location) -> dict[str, Any] | None:
    """The object that a file holds; None when it is missing, or not what was written."""
    data = files.read_bytes(path)
    try:
        content = msgspec.json.decode(data or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(content, dict) or sealed(content) != data:
        return None
    return content


def is_broken(data: bytes) -> bool:
    """Whether a file carries a checksum that is not its own."""
    content = msgspec.json.decode(data)
    return isinstance(content, dict) and CHECKSUM in content and sealed(content) != data
