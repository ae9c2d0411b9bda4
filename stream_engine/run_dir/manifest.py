"""The manifest: an append-only list of the shards, and of the inputs that were read to their end.

One JSON line each, with a checksum of what stands before it, in parts of at most 256 KiB: a line is
added by replacing the last part by itself and the line, or by creating the next part. So two
processes can never both add one, and nobody reads half of one. Only the holder of the ingest lease
adds; anybody reads at any time.

Memory: a shard's line holds its samples' keys, so lines are read when they are asked for; the
manifest itself keeps one offset per shard, counted over all parts.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import msgspec

from stream_engine.config import InputConfig, fingerprint
from stream_engine.errors import ChangedError, ShardReadError
from stream_engine.records import ShardInfo
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.base import Location, Version
from stream_engine.store.locations import canonical_source

PART_BYTES = 256 << 10
"""A part that would grow beyond is full; a longer line has a part of its own."""
CHECKSUM = re.compile(rb',"checksum":"([0-9a-f]{8})"}\n$')


class RowCounts(msgspec.Struct, kw_only=True):
    """Rows that were read: read = added + known + the rejected, by reason."""

    read: int = 0
    added: int = 0
    known: int = 0
    rejected: dict[str, int] = {}

    def plus(self, other: RowCounts, *, times: int = 1) -> RowCounts:
        """The sum, or with `times=-1` the difference."""
        reasons = sorted(self.rejected.keys() | other.rejected.keys())
        sums = {
            name: self.rejected.get(name, 0) + times * other.rejected.get(name, 0)
            for name in reasons
        }
        return RowCounts(
            read=self.read + times * other.read,
            added=self.added + times * other.added,
            known=self.known + times * other.known,
            rejected={name: count for name, count in sums.items() if count},
        )


class InputInfo(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="input"):
    """An input that was read to its end: read = added + known + the rejected."""

    source: str
    fingerprint: str
    """Hash of the source's state; empty: it is to be read again, whatever its state."""
    settings: str
    """Hash of the settings that decide what is read; see `reading_settings`."""
    max_samples: int | None = None
    """The limit of that reading. Whoever asks for no more has it read already."""
    read: int
    added: int
    known: int
    rejected: dict[str, int] = {}
    unread: list[str] = []
    """Columns that no reader knows."""
    left_out: dict[str, int] = {}
    """Files and members of tars that were not read: what they are -> how many."""
    examples: dict[str, str] = {}
    """The first of each kind that was left out."""
    notes: dict[str, int] = {}
    """What was done to rows that were read; see inputs.ingest.NOTES."""
    quarantine: str = ""
    """The name of the file of its rejected records, if there are any."""
    first_shard: int = 0
    """Of the round that read it."""
    unreadable: dict[str, RowCounts] = {}
    """Files that could not be read to their ends, and what of the counts is theirs."""

    def answers(self, config: InputConfig) -> bool:
        """Whether a reading with these settings would have taken no more."""
        return self.settings == reading_settings(config) and covers(self, config.max_samples)

    @property
    def readable_counts(self) -> RowCounts:
        """The counts without those of the unreadable files."""
        counts = RowCounts(
            read=self.read, added=self.added, known=self.known, rejected=self.rejected
        )
        for theirs in self.unreadable.values():
            counts = counts.plus(theirs, times=-1)
        return counts


class ShardLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="shard"):
    """A shard, and the input it was cut from."""

    shard: ShardInfo
    source: str = ""


class Shard(msgspec.Struct, frozen=True):
    """The little of a ShardInfo that is kept for every shard."""

    index: int
    num_samples: int
    sha256: str
    images: dict[int, int] = {}


class LineKind(msgspec.Struct):
    """The little that loading needs of every line."""

    kind: str
    source: str = ""
    shard: Shard | None = None


class Part(NamedTuple):
    """One file of the manifest, which begins at `start` of the whole."""

    path: Location
    start: int
    size: int
    version: Version


class ShardList(Sequence[ShardInfo]):
    """The shards in order; each is decoded from its line when it is asked for."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.offsets: list[int] = []

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardInfo]: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(index, slice):
            return list(self.at(self.offsets[index]))
        return next(self.at([self.offsets[index]]))

    def __iter__(self) -> Iterator[ShardInfo]:
        return self.at(self.offsets)

    def at(self, offsets: Sequence[int]) -> Iterator[ShardInfo]:
        """The shards whose lines begin at these offsets."""
        return (line.shard for line in self.lines(offsets))

    def lines(self, offsets: Sequence[int] | None = None) -> Iterator[ShardLine]:
        """The lines that begin at these offsets; else all.

        Raises:
            ShardReadError: when a part is not what it was.
        """
        in_memory, content = None, b""
        for offset in list(self.offsets if offsets is None else offsets):
            part = self.parts[bisect_right(self.parts, offset, key=lambda p: p.start) - 1]
            if in_memory is not part:
                in_memory, content = part, files.read_bytes(part.path) or b""
            start = offset - part.start
            line = content[start : content.find(b"\n", start)]
            try:
                yield msgspec.json.decode(line, type=ShardLine)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ShardReadError(part.path, "it has changed since it was read") from error


class Manifest:
    """`shards` in order of their index, and `inputs`, the latest line of each source."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self._begin()

    def _begin(self) -> None:
        self.parts: list[Part] = []
        self.shards = ShardList(self.parts)
        self.slim: list[Shard] = []
        self.inputs: dict[str, InputInfo] = {}
        self._input_offsets: dict[str, int] = {}
        self._whole_readings: dict[str, list[InputInfo]] = {}
        self._unfinished: dict[str, list[int]] = {}
        self.num_rejected: dict[str, dict[int, int]] = {}  # by source and its round's first shard
        self._last = b""
        self.end = 0

    @classmethod
    def load(cls, run_dir: RunDir) -> Manifest:
        """Read the manifest of a run; a run without one has no shards.

        Raises:
            ShardReadError: when a line is damaged.
        """
        return cls(run_dir).refresh()

    def refresh(self) -> Manifest:
        """Take up the lines that were added since.

        Raises:
            ShardReadError: when a line is damaged.
        """
        number = max(0, len(self.parts) - 1)
        while self._take_up(number):
            number += 1
        return self

    def _take_up(self, number: int) -> bool:
        """Read a part again if it has changed; False when there is none of that number."""
        path = self.run_dir.manifest_part(number)
        entry = files.stat(path)
        if entry is None:
            if number < len(self.parts):
                self._begin()
            return False
        is_known = number < len(self.parts)
        if is_known and self.parts[number].version == entry.version:
            return True
        content, entry = files.read(path) or (b"", entry)
        old = self._last if is_known else b""
        if not content.startswith(old):  # put back from a copy, or edited by hand
            self._begin()
            self.refresh()
            return False
        start = self.parts[number].start if is_known else self.end
        self.parts[number:] = [Part(path, start, len(content), entry.version)]
        self._last = content
        for position, line in enumerate(content[len(old) :].splitlines(keepends=True)):
            if not line.endswith(b"\n") or not self._add(line):
                which = old.count(b"\n") + position + 1
                raise ShardReadError(
                    path,
                    f"line {which} is damaged. Put a copy of the file back, or give the inputs to "
                    "another --work_dir",
                )
        return True

    def _add(self, line: bytes) -> bool:
        """Take up a complete line; False when it is damaged."""
        found = CHECKSUM.search(line)
        if found is not None and found[1] != checksum(line[: found.start()]):
            return False
        try:
            kind = msgspec.json.decode(line, type=LineKind)
            if kind.kind == "input":
                self._add_input(msgspec.json.decode(line, type=InputInfo))
            elif kind.shard is None:
                return False
            else:
                self.slim.append(kind.shard)
                self.shards.offsets.append(self.end)
                self._unfinished.setdefault(kind.source, []).append(self.end)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        self.end += len(line)
        return True

    def _add_input(self, info: InputInfo) -> None:
        self.inputs[info.source] = info
        of_source = self.num_rejected.setdefault(info.source, {})
        of_source[info.first_shard] = sum(info.rejected.values())
        if not info.fingerprint:
            self._whole_readings.pop(info.source, None)
            return
        self._input_offsets[info.source] = self.end
        self._unfinished.pop(info.source, None)
        if not info.unreadable:
            self._whole_readings.setdefault(info.source, []).append(info)

    def is_read(self, source: str, fingerprint: str, config: InputConfig | None = None) -> bool:
        """Whether this very state of a source was read to its end, lately or before.

        Nodes that see different times of change for one file have each a state of their own.
        """
        readings = list(self._whole_readings.get(canonical_source(source), ()))
        info = self.inputs.get(canonical_source(source))
        if info is not None:
            readings.append(info)
        return any(
            known.fingerprint == fingerprint and (config is None or known.answers(config))
            for known in readings
        )

    def unreadable_files(self, source: str, fingerprint: str, config: InputConfig) -> list[str]:
        """The files of a source in this state that could not be read to their ends."""
        info = self.inputs.get(canonical_source(source))
        if info is None or info.fingerprint != fingerprint or not info.answers(config):
            return []
        return sorted(info.unreadable)

    def is_left_to_read(self, source: str, fingerprint: str, config: InputConfig) -> bool:
        """Whether a source in this state was not read to its end, or some of its files were not."""
        return not self.is_read(source, fingerprint, config) or bool(
            self.unreadable_files(source, fingerprint, config)
        )

    def was_read_since(self, end: int, source: str, config: InputConfig) -> bool:
        """Whether a source was read by anybody after the manifest had that `end`."""
        info = self.inputs.get(canonical_source(source))
        return (
            info is not None
            and info.fingerprint != ""
            and info.answers(config)
            and self._input_offsets[info.source] >= end
        )

    def unfinished_shards(self, source: str) -> Iterator[ShardInfo]:
        """The shards of a source that were written since it was last read to its end."""
        return self.shards.at(self._unfinished.get(source, []))

    def num_samples_from(self, first_shard: int) -> int:
        """Samples of the shards from this one on."""
        return sum(shard.num_samples for shard in self.slim[first_shard:])

    def append_shard(self, shard: ShardInfo, *, source: str = "") -> None:
        """Add the line of a shard whose tar is in place."""
        assert shard.index == len(self.shards), f"{shard.index} after {len(self.shards)} shards"
        self._append(ShardLine(shard=shard, source=source))

    def append_input(self, info: InputInfo) -> None:
        """Add the line of an input whose shards are all in the manifest."""
        self._append(info)

    def forget_input(self, source: str) -> None:
        """Let a source be read again; its counts stand until then."""
        self._append(msgspec.structs.replace(self.inputs[source], fingerprint=""))

    def check_unchanged(self) -> None:
        """Raise ChangedError when another process has added a line since this one looked."""
        number = len(self.parts)
        last = self.parts[-1] if self.parts else None
        if last is not None and files.version_of(last.path) != last.version:
            raise ChangedError(last.path)
        if files.exists(self.run_dir.manifest_part(number)):
            raise ChangedError(self.run_dir.manifest_part(number))

    def _append(self, line: ShardLine | InputInfo) -> None:
        """Raises ChangedError when another process has added a line since this one looked."""
        open_line = msgspec.json.encode(line)[:-1]
        encoded = open_line + b',"checksum":"' + checksum(open_line) + b'"}\n'
        if self.parts and len(self._last) + len(encoded) <= PART_BYTES:
            part, content = self.parts[-1], self._last + encoded
            version = files.replace(part.path, content, part.version)
            self.parts[-1] = Part(part.path, part.start, len(content), version)
            self._last = content
        else:
            path = self.run_dir.manifest_part(len(self.parts))
            version = files.create(path, encoded)
            self._last = encoded
            self.parts.append(Part(path, self.end, len(encoded), version))
        assert self._add(encoded), encoded


def checksum(content: bytes) -> bytes:
    """Eight hex digits, which tell a bit that changed."""
    return b"%08x" % zlib.crc32(content)


def count_pictures(of_shards: Iterable[dict[int, int]]) -> dict[int, int]:
    """Number of pictures -> number of samples with as many, from the `images` of shards."""
    total: dict[int, int] = {}
    for images in of_shards:
        for number, num_samples in images.items():
            total[number] = total.get(number, 0) + num_samples
    return dict(sorted(total.items()))


def covers(info: InputInfo, max_samples: int | None) -> bool:
    """Whether that reading went as far as one with this limit."""
    if info.max_samples is None or info.read < info.max_samples:
        return True  # it came to the end
    return max_samples is not None and max_samples <= info.max_samples


def reading_settings(config: InputConfig) -> str:
    """Hash of the settings that decide which samples of an input are taken, its limit apart."""
    settings: dict[str, Any] = {
        "image_root": config.image_root,
        "max_image_pixels": config.max_image_pixels,
        "follow_links": config.follow_links,
        "columns": config.columns,
        "text_only": config.text_only,
    }
    if config.given_answers != "answers":
        settings["given_answers"] = config.given_answers
    return fingerprint(settings)
