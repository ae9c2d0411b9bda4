"""Parts of the dataset that stands which a merge would make again byte by byte: they are copied.

    a shard's pairs of a split ─▶ origin: hash of them, of what they are made from, and of all
                                  origins before it
    origin of a part           =  that of the shard in which its last row lies

Rows come in the order of the shards, and where a part ends is decided by the rows up to there. So
a part whose origin is the same has the same bytes, and an append leaves all parts as they are up to
the first pair about which a filter decides anew. The last part of a split is always made: more
rows may have room in it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.outputs.formats.base import (
    SPLITS,
    DatasetFiles,
    ParquetFiles,
    Split,
    split_named,
)
from stream_engine.outputs.parquet import Part
from stream_engine.outputs.published import CHUNK_BYTES, FileRecord, recorded
from stream_engine.pairs.merge_report import read_stats
from stream_engine.pairs.rows import RowsOrder, WrittenPair, written_pairs
from stream_engine.store import files
from stream_engine.store.base import Location

logger = logging.getLogger(__name__)

ROWS_MADE_BY = "rows_made_by"
"""In stats.json: hash of the settings of every row; none where a format refused a pair."""


class Origins:
    """The origin of each split so far, and its number of rows."""

    def __init__(self) -> None:
        self.of: dict[Split, str] = {}
        self.rows: Counter[Split] = Counter()

    def add(self, order: RowsOrder, written: Iterable[WrittenPair]) -> None:
        """Take in the next shard's pairs that are written."""
        pairs: dict[Split, list[Any]] = {}
        for one in written:
            pairs.setdefault(one.split, []).append(one.pair)
        for split, of_split in pairs.items():
            made_from = [self.of.get(split, ""), order.info.sha256, order.results, of_split]
            content = msgspec.msgpack.encode(made_from)
            self.of[split] = hashlib.blake2b(content, digest_size=16).hexdigest()
            self.rows[split] += len(of_split)


class Reuse:
    """Which parts of the dataset in a folder can stay, as far as is known.

    `is_open` until a shard has been seen that no part can outlast.
    """

    def __init__(self, folder: Location, made_by: str, export: DatasetFiles) -> None:
        """`made_by`: hash of the settings of every row."""
        stats = read_stats(folder) or {}
        self.folder = folder
        self.records = recorded(stats)
        self.waiting: dict[Split, list[Part]] = {}
        self.found: dict[Split, list[Part]] = {}
        if isinstance(export, ParquetFiles) and stats.get(ROWS_MADE_BY) == made_by:
            origins = stats.get("origins", {})
            parts = [
                msgspec.structs.replace(part, origin=origins.get(part.name, ""))
                for part in msgspec.convert(stats["parts"], list[Part])
            ]
            for split in SPLITS:
                of_split = [part for part in parts if split_named(part.name) == split]
                self.waiting[split] = of_split[:-1]
                self.found[split] = []

    @property
    def is_open(self) -> bool:
        return any(self.waiting.values())

    def see(self, origins: Origins) -> None:
        """Note which parts end in the shard that was added last."""
        for split, waiting in self.waiting.items():
            num_found = sum(part.rows for part in self.found[split])
            while waiting and num_found + waiting[0].rows <= origins.rows[split]:
                if waiting[0].origin != origins.of[split]:
                    waiting.clear()
                    break
                num_found += waiting[0].rows
                self.found[split].append(waiting.pop(0))

    def hand_over(self, export: DatasetFiles) -> dict[Split, int]:
        """Copy what was found to where the format writes; returns the rows of each split."""
        taken: dict[Split, int] = {}
        for split, parts in self.found.items():
            assert isinstance(export, ParquetFiles)
            if not parts:
                continue
            target = export.parts_of(split)
            whole: list[Part] = []
            for number, part in enumerate(parts):
                record = self.records.get(part.name)
                if not is_copied(self.folder / part.name, target.unfinished(number), record):
                    logger.warning("%s is not what was written; it is made again", part.name)
                    break
                whole.append(part)
            target.begin_with(whole)
            taken[split] = sum(part.rows for part in whole)
        return taken


def find(reuses: Sequence[Reuse], orders: Iterator[RowsOrder], test_fraction: float) -> None:
    """Look through the shards, as far as any part may stay."""
    origins = Origins()
    while any(reuse.is_open for reuse in reuses):
        order = next(orders, None)
        if order is None:
            return
        origins.add(order, written_pairs(order, test_fraction))
        for reuse in reuses:
            reuse.see(origins)


def is_copied(source: Location, target: Path, record: FileRecord | None) -> bool:
    """Copy a file of rows; False when it is not, or no longer, the one of the record."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with files.open_file(source) as old, target.open("wb") as new:
            while chunk := old.read(CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += new.write(chunk)
    except FileNotFoundError:
        return False
    return record == FileRecord(num_bytes, digest.hexdigest())
