"""The headers of a stage's results, kept in one file beside them.

Whoever looks at a run of ten thousand shards reads that file instead of ten thousand. Nothing is
believed for it: a header counts for the very version of the result that it was read from, and what
the file lacks, because it is old, damaged or gone, is read from the results themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from stream_engine.config import Stage
from stream_engine.errors import ChangedError
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import ResultHeader
from stream_engine.run_dir.sealed import checked, with_digest
from stream_engine.store import files
from stream_engine.store.base import Version

logger = logging.getLogger(__name__)

FEW = 32
"""So many results are read one by one, without a look at what is kept."""
MANY = 64
"""So many headers that were not kept are worth a new file."""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """A result file as it was when its header was read; None when that failed."""

    version: Version
    header: ResultHeader | None


DECODER = msgspec.msgpack.Decoder(dict[int, Seen])


class KeptHeaders:
    """The kept headers of one stage, by the shard's index."""

    def __init__(self, run_dir: RunDir, stage: Stage) -> None:
        self.path = run_dir.headers(stage)
        self.version: Version | None = None
        self.seen: dict[int, Seen] = {}

    def refresh(self) -> dict[int, Seen]:
        """What is kept now; nothing where there is no file, or a damaged one."""
        version = files.version_of(self.path)
        if version != self.version:
            found = files.read(self.path)
            self.version = found[1].version if found is not None else None
            self.seen = decoded(found[0]) if found is not None else {}
        return self.seen

    def keep(self, seen: Mapping[int, Seen]) -> None:
        """Write headers over the file that was last read, unless another process has by now."""
        content = msgspec.msgpack.encode({i: one for i, one in seen.items() if one.header})
        try:
            data = with_digest(content)
            self.version = files.replace(self.path, data, self.version, durable=False)
            self.seen = dict(seen)
        except ChangedError:
            return
        except OSError as error:  # a full or read-only disk: everybody reads the results then
            logger.debug("the headers are not kept: %s", error)


def decoded(content: bytes) -> dict[int, Seen]:
    """The headers in a file; none when it is not what was written."""
    try:
        return DECODER.decode(checked(content) or b"")
    except (msgspec.DecodeError, UnicodeDecodeError):  # of another version of this program
        return {}
