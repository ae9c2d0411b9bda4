"""One format of pairs in the making: takes rows as they come, counts, and finishes the files."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stream_engine.config import RunConfig
from stream_engine.errors import ConservationError
from stream_engine.outputs.card import dataset_card, write_example
from stream_engine.outputs.formats import export_class
from stream_engine.outputs.formats.base import SPLITS, PairRow, ParquetFiles, Split
from stream_engine.outputs.publication import Publication
from stream_engine.pairs.merge_report import balance_line
from stream_engine.pairs.output import Output
from stream_engine.pairs.reuse import ROWS_MADE_BY, Reuse
from stream_engine.pairs.rows import Chunk, WrittenPair
from stream_engine.pairs.statistics import PairStatistics


class PairOutput(Output):
    """One format of pairs in the making."""

    def __init__(
        self, name: str, publication: Publication, scratch: Path, config: RunConfig, *, made_by: str
    ) -> None:
        """`made_by`: hash of the settings of every row."""
        self.made_by = made_by
        self.export = export_class(name)(scratch, max_part_bytes=config.max_part_bytes)
        super().__init__(name, publication, scratch, self.export)
        self.dropped: Counter[str] = Counter()
        self.statistics = PairStatistics()
        self.splits: Counter[str] = Counter()
        self.rounds: Counter[int] = Counter()
        self.example: PairRow | None = None
        self.reuse = Reuse(publication.folder, made_by, self.export)
        self.num_there: Mapping[Split, int] = {}

    def keep_parts(self) -> None:
        """Take over the parts that were found to stay as they are."""
        self.num_there = self.reuse.hand_over(self.export)

    def is_there(self, split: Split, num_rows: int) -> bool:
        """Whether the first so many rows of a split are in parts that were taken over."""
        return num_rows <= self.num_there.get(split, 0)

    def take(
        self, chunk: Chunk, written: Sequence[WrittenPair], origins: Mapping[Split, str]
    ) -> None:
        """Write the rows of these pairs, but for those that this format cannot express."""
        if isinstance(self.export, ParquetFiles):
            self.export.origins = origins
            there = Counter(pair.split for pair in written if pair.split in chunk.there)
            for split, num_rows in there.items():
                self.export.parts_of(split).pass_over(num_rows)
        if self.name in chunk.content:
            self.export.take(chunk.content[self.name])
        self.example = self.example or chunk.examples.get(self.name)
        for one, refusal in zip(written, chunk.refusals[self.name], strict=True):
            if refusal is None:
                self.statistics.add_pair(one.pair, one.key)
                self.splits[one.split] += 1
                self.rounds[one.round] += 1
            else:
                self.dropped[refusal] += 1

    def finish(self, config: RunConfig, common: Mapping[str, Any]) -> None:
        """Close the files, check the counts, and make card and statistics."""
        parts = self.export.close()
        dropped = Counter(common["pairs"]["dropped"]) + self.dropped
        candidates, written = common["pairs"]["candidates"], self.statistics.num_pairs
        if candidates != written + sum(dropped.values()):
            line = balance_line(candidates, written, dropped)
            raise ConservationError(f"{self.name}: the pairs do not add up: {line}")
        if written != sum(part.rows for part in parts):
            raise ConservationError(
                f"{self.name}: {written} pairs were written, but the files hold "
                f"{sum(part.rows for part in parts)}"
            )
        stats = {
            **{name: value for name, value in common.items() if name != "resolved_sampling"},
            **self.statistics.to_dict(),
            "format": self.name,
            "samples": {**common["samples"], "with_pairs": self.statistics.num_samples},
            "pairs": {
                "candidates": candidates,
                "written": written,
                "dropped": dict(sorted(dropped.items())),
            },
            "rounds": [{**one, "pairs": self.rounds[one["round"]]} for one in common["rounds"]],
            "splits": {split: self.splits[split] for split in SPLITS if self.splits[split]},
            ROWS_MADE_BY: "" if self.dropped else self.made_by,
        }
        picture = write_example(self.scratch, self.example.sample if self.example else None)
        self.seal(
            stats,
            parts,
            functools.partial(
                dataset_card,
                config,
                export=type(self.export),
                example=self.example,
                picture=picture,
                resolved_sampling=common["resolved_sampling"],
            ),
        )
