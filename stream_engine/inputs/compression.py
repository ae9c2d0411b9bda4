"""Compressed files as streams that are read forward, with a little of what was read kept."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from contextlib import suppress
from typing import BinaryIO, Protocol, cast

from stream_engine.inputs.unread import Unreadable

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz", ".lz4": "lz4"}
"""Suffix -> codec; zstd and lz4 are pyarrow's, the others Python's own."""
BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
"""How compressed data begin -> codec."""

CHUNK_BYTES = 1 << 18
KEPT_BYTES = 2 * CHUNK_BYTES
"""More than the buffer above reads at once, behind which it may be asked to go back."""


def codec_of(name: str) -> str | None:
    """The codec that a file's suffix says, or None."""
    return next((codec for end, codec in CODECS.items() if name.lower().endswith(end)), None)


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """A stream of what a file holds, decompressed where it is compressed: all of its members one
    after the other.

    How the file begins tells, since a download may drop the compression and keep the suffix. Frames
    of zstd and lz4 may begin in other ways too: there the suffix tells as well.
    """
    head = stream.read(8)
    stream.seek(0)
    codec = next((codec for begin, codec in BEGINNINGS.items() if head.startswith(begin)), None)
    if codec is None and codec_of(name) in ("zstd", "lz4"):
        codec = codec_of(name)
    if codec is None:
        return stream
    raw: Readable
    if codec in DECODERS:
        raw = MemberReader(stream, codec)
    else:
        raw = FrameReader(stream, codec)
    return cast(BinaryIO, io.BufferedReader(ForwardReader(raw), CHUNK_BYTES))


class Readable(Protocol):
    """What is read forward."""

    def read(self, size: int, /) -> bytes: ...


class Decoder(Protocol):
    """Of one member, as `bz2` and `lzma` have it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class GzipDecoder:
    """zlib's decoder of a gzip member, in the form of the others."""

    def __init__(self) -> None:
        self.inner = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def needs_input(self) -> bool:
        return not self.inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self.inner.decompress(self.inner.unconsumed_tail + data, max_length)


DECODERS: dict[str, type[Decoder]] = {
    "gzip": GzipDecoder,
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class MemberReader:
    """Reads what the members of a compressed stream hold; zeros between and behind them are
    padding. What stands before a damaged place is read before the error is raised."""

    def __init__(self, stream: BinaryIO, codec: str) -> None:
        self.stream = stream
        self.new_decoder = DECODERS[codec]
        self.decoder = self.new_decoder()

    def read(self, size: int, /) -> bytes:
        """At most so many bytes, b"" at the end.

        Raises:
            EOFError, OSError, lzma.LZMAError or zlib.error: for data that are cut or damaged.
        """
        while True:
            given = b""
            if self.decoder.eof:
                given = self.next_member()
                if not given:
                    return b""
                self.decoder = self.new_decoder()
            elif self.decoder.needs_input:
                given = self.stream.read(CHUNK_BYTES)
                if not given:
                    raise EOFError("the compressed data end too early: the file is cut")
            if data := self.decoder.decompress(given, size):
                return data

    def next_member(self) -> bytes:
        """What follows the member that was read to its end, b"" for nothing but padding."""
        given = self.decoder.unused_data or self.stream.read(CHUNK_BYTES)
        while given and not (given := given.lstrip(b"\0")):
            given = self.stream.read(CHUNK_BYTES)
        return given


class FrameReader:
    """Reads zstd and lz4. pyarrow's stream loses what a read had decompressed before a damaged
    place: such a file is read again, a byte at a time there, so that this comes first."""

    def __init__(self, stream: BinaryIO, codec: str) -> None:
        self.stream = stream
        self.codec = codec
        self.raw = self.begun()
        self.num_read = 0
        self.error: OSError | None = None

    def begun(self) -> Readable:
        import pyarrow as pa

        self.stream.seek(0)
        return pa.CompressedInputStream(self.stream, self.codec)

    def read(self, size: int, /) -> bytes:
        """At most so many bytes, b"" at the end.

        Raises:
            OSError: for data that are cut or damaged.
        """
        if self.error is not None:
            raise self.error
        try:
            data = self.raw.read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            self.error = error
            data = self.salvaged()[:size]
            if not data:
                raise
        self.num_read += len(data)
        return data

    def salvaged(self) -> bytes:
        """What can be decompressed behind what was read."""
        again, left, found = self.begun(), self.num_read, bytearray()  # the first's end closes both
        while left:
            left -= len(again.read(min(left, CHUNK_BYTES)))
        with suppress(OSError):
            while byte := again.read(1):
                found += byte
        self.raw = again
        return bytes(found)


class ForwardReader(io.RawIOBase):
    """Gives a stream that only reads the `seek` and `tell` that tar readers need: forward by
    reading, and back as far as `KEPT_BYTES`.

    Raises:
        Unreadable: for damaged data.
        OSError: for a jump further back.
    """

    def __init__(self, raw: Readable) -> None:
        self.raw = raw
        self.window = b""
        self.position = 0
        self.behind = 0
        """How far the position lies before the end of what was read."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.behind:
            data = self.window[len(self.window) - self.behind :][: len(buffer)]
            self.behind -= len(data)
        else:
            try:
                data = self.raw.read(len(buffer))
            except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk, not of the data
                raise Unreadable(str(error)) from error
            self.window = (self.window + data)[-KEPT_BYTES:]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self.position
        elif whence == io.SEEK_END:
            raise OSError("the end of a compressed stream is not known before it is read")
        back = self.position + self.behind - offset
        if back > len(self.window):
            raise OSError(f"cannot go back {back} bytes in a compressed stream")
        if back >= 0:
            self.behind, self.position = back, offset
        while self.position < offset and self.read(min(CHUNK_BYTES, offset - self.position)):
            pass
        return self.position
