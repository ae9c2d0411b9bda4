"""Parts of the dataset that stands which a merge would make again byte by byte: they are copied.

    origin of a part: hash of all pairs up to the end of the shard in which its last row lies, and
                      of what is decided about each (milestones.py)

Rows come in the order of the shards, and where a part ends is decided by the rows up to there. So
a part whose origin is the same has the same bytes, and an append leaves all parts as they are up to
the first pair about which a filter decides anew. The last part of a split is always made: more
rows may have room in it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

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
from stream_engine.pairs.balance import Balances
from stream_engine.pairs.merge_report import read_stats
from stream_engine.pairs.milestones import Milestones
from stream_engine.store import files
from stream_engine.store.base import Location

logger = logging.getLogger(__name__)

ROWS_MADE_BY = "rows_made_by"
"""In stats.json: hash of the settings of every row; none where a format refused a pair."""


class Reuse:
    """Which parts of the dataset in a folder can stay."""

    def __init__(
        self, folder: Location, made_by: str, export: DatasetFiles, milestones: Milestones
    ) -> None:
        """`made_by`: hash of the settings of every row."""
        stats = read_stats(folder) or {}
        self.folder = folder
        self.records = recorded(stats)
        self.milestones = milestones
        self.parts: list[Part] = []
        self.found: dict[Split, list[Part]] = {}
        if isinstance(export, ParquetFiles) and stats.get(ROWS_MADE_BY) == made_by:
            origins = stats.get("origins", {})
            self.parts = [
                msgspec.structs.replace(part, origin=origins.get(part.name, ""))
                for part in msgspec.convert(stats["parts"], list[Part])
            ]

    def find(self, chain: Sequence[str], balances: Balances) -> None:
        """Note the parts whose pairs, and what is decided about them, are what they were."""
        for split in SPLITS:
            of_split = [part for part in self.parts if split_named(part.name) == split]
            self.found[split] = list(
                takewhile(
                    lambda part: self.milestones.tells(part.origin, chain, balances), of_split[:-1]
                )
            )

    def hand_over(self, export: DatasetFiles) -> dict[Split, int]:
        """Copy what was found to where the format writes; returns the rows of each split."""
        taken: dict[Split, int] = {}
        for split, parts in self.found.items():
            if not parts:
                continue
            assert isinstance(export, ParquetFiles)
            target = export.parts_of(split)
            whole: list[Part] = []
            for number, part in enumerate(parts):
                record = self.records.get(part.name)
                if not is_copied(self.folder / part.name, target.unfinished(number), record):
                    logger.warning("%s is not what was written; it is made again", part.name)
                    break
                whole.append(part)
            self.found[split] = whole
            target.begin_with(whole)
            taken[split] = sum(part.rows for part in whole)
        return taken


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
