"""The check of an input before a run: what ingest would reject, and what it would tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from stream_engine.config import InputConfig
from stream_engine.inputs.ingest import note_lines
from stream_engine.inputs.readers import read_rows
from stream_engine.inputs.unread import Unread
from stream_engine.records import Failure
from stream_engine.run_dir.remedies import remedy_lines
from stream_engine.text import printable


class InputCheck:
    """Reads an input as ingest does, and writes nothing."""

    def __init__(self, source: str, config: InputConfig) -> None:
        self.source = source
        self.config = config
        self.unread = Unread()
        self.notes: Counter[str] = Counter()
        self.images: Counter[int] = Counter()
        self.rejected: Counter[str] = Counter()
        self.num_rows = 0

    def problems(self) -> Iterator[str]:
        """What would be rejected, one line each, as it is found.

        Raises:
            ConfigError: when there is nothing to read.
        """
        key_of: dict[str, str] = {}
        for row in read_rows(self.source, self.config, unread=self.unread):
            self.num_rows += 1
            where = f"{printable(row.source)}, row {row.row}"
            if isinstance(row.item, Failure):
                self.rejected[row.item.reason] += 1
                detail = f": {printable(row.item.detail)}" if row.item.detail else ""
                named = f" (id {printable(row.item.idx)})" if row.item.idx else ""
                yield f"{where}{named}: {row.item.reason}{detail}"
                continue
            is_shared = bool(row.item.answers)
            if not is_shared and key_of.setdefault(row.item.idx, row.item.key) != row.item.key:
                self.rejected["conflicting_id"] += 1
                idx = printable(row.item.idx)
                yield f"{where}: conflicting_id: idx '{idx}' was given to another sample before"
                continue
            self.images[len(row.item.images)] += 1
            self.notes.update(row.notes)
        if self.num_rows == 0:
            yield f"{self.source}: no rows"

    def lines(self) -> list[str]:
        """What to tell besides, once the problems were gone through."""
        counts = ", ".join(f"{n} with {k}" for k, n in sorted(self.images.items()))
        return [
            f"{self.num_rows} rows: {sum(self.images.values())} samples, "
            f"{sum(self.rejected.values())} rejected",
            *([f"samples by number of pictures: {counts}"] if counts else []),
            *note_lines(self.notes, {}),
            *self.unread.lines(),
            *remedy_lines(self.rejected),
        ]
