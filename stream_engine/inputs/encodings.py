"""Texts that are not UTF-8 but say what they are by a byte order mark: UTF-16, UTF-32."""

from __future__ import annotations

import codecs
import io
from typing import BinaryIO, cast

from stream_engine.inputs.unread import Unreadable

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Longest first: that of UTF-32 may begin as that of UTF-16 does."""
CHUNK_BYTES = 1 << 16


def encoding_of(head: bytes) -> str | None:
    """The encoding that a text's first four bytes say, where it is not UTF-8."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), None)


def as_utf8(stream: BinaryIO) -> BinaryIO:
    """A stream of the same text in UTF-8; one without such a mark is given back as it is."""
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    if encoding is None:
        return stream
    return cast(BinaryIO, io.BufferedReader(Recoder(stream, encoding)))


def text_in_utf8(data: bytes) -> bytes:
    """A short text in UTF-8; what its mark promises and it does not hold is left as it is."""
    encoding = encoding_of(data[:4])
    try:
        return data if encoding is None else data.decode(encoding).encode()
    except UnicodeDecodeError:
        return data


class Recoder(io.RawIOBase):
    """Reads a text of an encoding as UTF-8. Half surrogate pairs stay, to be rejected by row.

    Raises:
        Unreadable: where the text is cut within a character, or holds what is none.
    """

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
        self.rest = b""
        self.at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self.rest and not self.at_end:
            data = self.stream.read(CHUNK_BYTES)
            self.at_end = not data
            try:
                text = self.decoder.decode(data, final=self.at_end)
            except UnicodeDecodeError as error:
                raise Unreadable(f"not the text that its mark promises: {error}") from error
            self.rest = text.encode("utf-8", "surrogatepass")
        data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
