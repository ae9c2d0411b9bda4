"""Files that carry their own checksum: a byte that changed is told from the file alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from stream_engine.store import files
from stream_engine.store.base import Location

CHECKSUM = "checksum"
DIGEST_BYTES = hashlib.sha256().digest_size


def with_digest(body: bytes) -> bytes:
    """Any bytes, after the SHA-256 of them."""
    return hashlib.sha256(body).digest() + body


def checked(data: bytes) -> bytes | None:
    """What `with_digest` was given; None when the bytes are not what was written."""
    body = data[DIGEST_BYTES:]
    return body if with_digest(body) == data else None


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
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(content, dict) or sealed(content) != data:
        return None
    return content


def is_broken(data: bytes) -> bool:
    """Whether a file carries a checksum that is not its own."""
    content = msgspec.json.decode(data)
    return isinstance(content, dict) and CHECKSUM in content and sealed(content) != data
