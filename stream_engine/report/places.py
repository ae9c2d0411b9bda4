"""A run's pairs as numbers in a file, and the draw of those that are shown.

Neither grows in memory with the number of pairs.
"""

from __future__ import annotations

import heapq
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, NamedTuple

KEPT = "kept"
NUM_EXTREMES = 10
"""Pairs of the smallest and the largest margin, and of the longest and the shortest answers."""
NUM_OF_A_REASON = 10
"""Dropped pairs of each reason, and questions without a pair of each reason."""


class Place(NamedTuple):
    """A scored sample: its shard, and its place among the shard's rewards."""

    shard: int
    number: int


class PairPlace(NamedTuple):
    """A candidate pair: where it stands, and the numbers that all counts are made of."""

    shard: int
    number: int
    chosen: int
    rejected: int
    chosen_score: float
    rejected_score: float
    chosen_words: int
    rejected_words: int
    reason: int
    """0 for a pair that passed the filters, else the number of the reason that dropped it."""

    @property
    def place(self) -> Place:
        return Place(self.shard, self.number)

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score

    @property
    def words(self) -> int:
        return self.chosen_words + self.rejected_words


class PairFile:
    """A temporary file of PairPlaces, in the order in which they were added."""

    RECORD = struct.Struct("<IIIIddIIH")
    CHUNK = 4096  # records

    def __enter__(self) -> PairFile:
        self.file = tempfile.TemporaryFile()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def add(self, pair: PairPlace) -> None:
        self.file.write(self.RECORD.pack(*pair))

    def __iter__(self) -> Iterator[PairPlace]:
        self.file.seek(0)
        while data := self.file.read(self.RECORD.size * self.CHUNK):
            yield from map(PairPlace._make, self.RECORD.iter_unpack(data))


@dataclass
class Shown:
    """A pair that the report shows, or (`pair` None) a question without one."""

    place: Place
    pair: PairPlace | None
    fate: str
    """KEPT, or the reason."""
    tags: list[str] = field(default_factory=list)
    """The extremes that it is one of."""


class Draw:
    """Pairs and questions on offer, one after the other -> those to show."""

    EXTREMES: ClassVar[dict[str, Callable[[PairPlace], float]]] = {
        "smallest margin": lambda pair: -pair.margin,
        "largest margin": lambda pair: pair.margin,
        "longest": lambda pair: pair.words,
        "shortest": lambda pair: -pair.words,
    }

    def __init__(self, num_rows: int, seed: int) -> None:
        """`num_rows` of the kept pairs are drawn at random by `seed`; the extremes come on top."""
        self.num_rows = num_rows
        self.seed = seed
        self.samples: dict[str, Reservoir] = {}
        self.heaps: dict[str, list[tuple[float, int, Shown]]] = {name: [] for name in self.EXTREMES}
        self.num_offered = 0

    def offer(self, shown: Shown) -> None:
        """Take note of a pair or question."""
        self.num_offered += 1
        if shown.fate not in self.samples:
            size = self.num_rows if shown.fate == KEPT else NUM_OF_A_REASON
            self.samples[shown.fate] = Reservoir(size, f"{self.seed} {shown.fate}")
        self.samples[shown.fate].offer(shown)
        if shown.fate != KEPT or shown.pair is None:
            return
        for name, value_of in self.EXTREMES.items():
            item = (value_of(shown.pair), -self.num_offered, shown)
            heap = self.heaps[name]
            if len(heap) < NUM_EXTREMES:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)

    def result(self) -> list[Shown]:
        """What was drawn, in the order of the run."""
        for name, heap in self.heaps.items():
            for _, _, shown in heap:
                shown.tags.append(name)
        drawn = [shown for sample in self.samples.values() for shown in sample.items]
        drawn += [shown for heap in self.heaps.values() for _, _, shown in heap]
        distinct = {(s.place, s.pair and (s.pair.chosen, s.pair.rejected)): s for s in drawn}
        return [shown for _, shown in sorted(distinct.items(), key=lambda item: order_of(item[1]))]

    def extremes(self, name: str) -> list[Shown]:
        """The pairs of one extreme, the most extreme first."""
        return [shown for _, _, shown in sorted(self.heaps[name], reverse=True)]


class Reservoir:
    """A sample of a stream of unknown length, each item as likely as any other (Vitter's R)."""

    def __init__(self, size: int, seed: str) -> None:
        self.size = size
        self.items: list[Shown] = []
        self.num_seen = 0
        self.rng = random.Random(seed)

    def offer(self, item: Shown) -> None:
        self.num_seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := self.rng.randrange(self.num_seen)) < self.size:
            self.items[place] = item


def order_of(shown: Shown) -> tuple[int, int, float, int, int]:
    """By shard and sample, a sample's kept pairs first, the largest margin before the others."""
    pair = shown.pair
    if pair is None:
        return (*shown.place, 0.0, 0, 0)
    return (*shown.place, -pair.margin, pair.chosen, pair.rejected)
