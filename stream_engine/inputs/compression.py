"""Compressed files as streams that are read forward, with a little of what was read kept."""

from __future__ import annotations

import io
import lzma
from typing import TYPE_CHECKING, BinaryIO, cast

from stream_engine.inputs.unread import Unreadable

if TYPE_CHECKING:
    import pyarrow as pa

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz", ".lz4": "lz4"}
"""Suffix -> pyarrow's codec; xz is Python's own."""

CHUNK_BYTES = 1 << 18
KEPT_BYTES = 2 * CHUNK_BYTES
"""More than the buffer above reads at once, behind which it may be asked to go back."""


def codec_of(name: str) -> str | None:
    """The codec that a file's suffix says, or None."""
    return next((codec for end, codec in CODECS.items() if name.lower().endswith(end)), None)


def decompressed(stream: BinaryIO, codec: str | None) -> BinaryIO:
    """A stream of what a compressed one holds, all of its members one after the other."""
    if codec is None:
        return stream
    if codec == "xz":
        raw = lzma.LZMAFile(stream)  # noqa: SIM115  closed by whom it is given to
    else:
        import pyarrow as pa

        raw = pa.CompressedInputStream(stream, codec)
    return cast(BinaryIO, io.BufferedReader(ForwardReader(raw), CHUNK_BYTES))


class ForwardReader(io.RawIOBase):
    """Gives a stream that only reads the `seek` and `tell` that tar readers need: forward by
    reading, and back as far as `KEPT_BYTES`.

    Raises:
        Unreadable: for damaged data.
        OSError: for a jump further back.
    """

    def __init__(self, raw: BinaryIO | lzma.LZMAFile | pa.CompressedInputStream) -> None:
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
            except (EOFError, lzma.LZMAError, OSError) as error:
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
