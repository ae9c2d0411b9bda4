"""One format of pairs in the making: takes rows as they come, counts, and finishes the files."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.config import RunConfig
from stream_engine.errors import ConservationError
from stream_engine.outputs.card import dataset_card, write_example
from stream_engine.outputs.formats import export_class
from stream_engine.outputs.formats.base import SPLITS, PairRow, ParquetFiles, Split
from stream_engine.outputs.publication import Publication
from stream_engine.pairs.balance import Balances
from stream_engine.pairs.merge_report import balance_line
from stream_engine.pairs.milestones import (
    Counted,
    Milestone,
    Milestones,
    Step,
    keep_milestones,
    read_milestones,
)
from stream_engine.pairs.output import Output
from stream_engine.pairs.reuse import ROWS_MADE_BY, Reuse
from stream_engine.pairs.rows import Chunk, WrittenPair
from stream_engine.pairs.statistics import PairStatistics
from stream_engine.store.base import Location


class PairOutput(Output):
    """One format of pairs in the making."""

    def __init__(
        self,
        name: str,
        publication: Publication,
        scratch: Path,
        config: RunConfig,
        *,
        made_by: str,
        milestones: Location,
    ) -> None:
        """`made_by`: hash of the settings of every row; `milestones`: the file to keep them in."""
        self.made_by = made_by
        self.place = milestones
        self.old = read_milestones(milestones).under(made_by)
        self.new: dict[str, msgspec.Raw] = {}
        self.export = export_class(name)(scratch, max_part_bytes=config.max_part_bytes)
        super().__init__(name, publication, scratch, self.export)
        self.dropped: Counter[str] = Counter()
        self.statistics = PairStatistics()
        self.splits: Counter[Split] = Counter()
        self.rounds: Counter[int] = Counter()
        self.example: PairRow | None = None
        self.reuse = Reuse(publication.folder, made_by, self.export, self.old)
        self.num_there: Mapping[Split, int] = {}

    def keep_parts(self, chain: Sequence[str], balances: Balances) -> None:
        """Take over the parts that stay as they are."""
        self.reuse.find(chain, balances)
        self.num_there = self.reuse.hand_over(self.export)

    def is_there(self, split: Split, num_rows: int) -> bool:
        """Whether the first so many rows of a split are in parts that were taken over."""
        return num_rows <= self.num_there.get(split, 0)

    def reached(self) -> Iterator[Milestone]:
        """The milestones of the parts that were taken over."""
        for parts in self.reuse.found.values():
            yield from (self.old.of(part.origin) for part in parts)

    def can_begin(self, milestone: Milestone) -> bool:
        """Whether all that was written before it is in parts that were taken over, and counted as
        it would be now."""
        now, then = self.statistics.margins, milestone.pairs.margins
        return (then.least, then.greatest) == (now.least, now.greatest) and all(
            self.is_there(split, num_rows) for split, num_rows in milestone.splits.items()
        )

    def begin(self, milestone: Milestone) -> None:
        """Go on from there."""
        self.statistics = copy.deepcopy(milestone.pairs)
        self.splits, self.rounds = Counter(milestone.splits), Counter(milestone.rounds)
        assert isinstance(self.export, ParquetFiles)
        for split, num_rows in milestone.splits.items():
            self.export.parts_of(split).pass_over(num_rows)

    def note(self, step: Step, origin: str) -> None:
        """The rows of a shard come; what was written so far is kept while a part may end there."""
        if isinstance(self.export, ParquetFiles):
            in_use = self.export.origins()
            self.new = {one: content for one, content in self.new.items() if one in in_use}
            milestone = Milestone(
                step=step, pairs=self.statistics, splits=self.splits, rounds=self.rounds
            )
            self.new[origin] = msgspec.Raw(msgspec.msgpack.encode(milestone))
            self.export.origin = origin

    def take(self, chunk: Chunk, written: Sequence[WrittenPair]) -> None:
        """Write the rows of these pairs, but for those that this format cannot express."""
        if isinstance(self.export, ParquetFiles):
            there = Counter(pair.split for pair in written if pair.split in chunk.there)
            for split, num_rows in there.items():
                self.export.parts_of(split).pass_over(num_rows)
        if self.name in chunk.content:
            self.export.take(chunk.content[self.name])
        self.example = self.example or chunk.examples.get(self.name)
        refusals = chunk.refusals[self.name]
        kept = [one for one, refusal in zip(written, refusals, strict=True) if refusal is None]
        self.dropped.update([refusal for refusal in refusals if refusal is not None])
        self.statistics.add_pairs([one.pair for one in kept], [one.key for one in kept])
        self.splits.update([one.split for one in kept])
        self.rounds.update([one.round for one in kept])

    def finish(self, config: RunConfig, common: Mapping[str, Any]) -> None:
        """Close the files, check the counts, and make card and statistics."""
        parts = self.export.close()
        noted = {**self.old.of_origins, **self.new}
        ends = [] if self.dropped else [part.origin for part in parts if part.origin in noted]
        self.new = {origin: noted[origin] for origin in ends}
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

    def keep_milestones(self, counted: Counted) -> None:
        """For the next merge, once the parts are where it finds them."""
        milestones = Milestones(counted=counted, made_by=self.made_by, of_origins=self.new)
        keep_milestones(self.place, milestones)
