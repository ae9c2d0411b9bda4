"""The second pass of a merge: decide about every pair, have rows made of those that stay, write.

It begins at the beginning, or at a milestone before which the parts that were taken over from the
old dataset have every row. What concerns all shards is decided here, in their order; the rows of
one shard are made by a helper or by this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import msgspec

from stream_engine.errors import ConservationError
from stream_engine.outputs.formats.base import Split
from stream_engine.pairs.balance import Balances
from stream_engine.pairs.helpers import Crew
from stream_engine.pairs.merge_debug import DebugFiles
from stream_engine.pairs.milestones import Milestone, Step
from stream_engine.pairs.pair_output import PairOutput
from stream_engine.pairs.rows import Chunk, RowsOrder, WrittenPair, written_pairs
from stream_engine.records import ShardInfo
from stream_engine.run_dir.rankings import RankedShard

Shards = Iterable[tuple[ShardInfo, RankedShard]]


class ShardRows(NamedTuple):
    """A shard, its pairs that are written, and what was decided before."""

    number: int
    written: list[WrittenPair]
    step: Step
    origin: str


class Decisions:
    """About the pairs of one shard after the other."""

    def __init__(
        self,
        chain: Sequence[str],
        balances: Balances,
        outputs: Sequence[PairOutput],
        *,
        test_fraction: float,
        after: Milestone | None = None,
    ) -> None:
        """`balances` have counted; `after` is where to begin, None: at the first shard."""
        self.chain = chain
        self.outputs = outputs
        self.test_fraction = test_fraction
        self.num_shards = after.step.num_shards if after else 0
        self.balances = balances.at(after.step.passed if after else {})
        self.dropped: Counter[str] = Counter(after.step.dropped if after else {})
        """By reason, what no format gets."""
        self.rows: Counter[Split] = Counter(after.splits if after else {})

    def decide(self, info: ShardInfo, ranked: RankedShard) -> tuple[RowsOrder, Step]:
        """The order for the rows of the next shard."""
        balance, dropped, passed = self.balances.of(info.index), dict(self.dropped), self.passed
        order = RowsOrder(
            info=info,
            results=ranked.results,
            pairs=ranked.pairs,
            reasons=balance.reasons_to_drop(ranked.pairs),
            round=self.balances.round_of(info.index),
        )
        self.dropped.update(ranked.dropped)
        self.dropped.update([reason for reason in order.reasons if reason is not None])
        self.num_shards += 1
        step = Step(
            num_shards=self.num_shards - 1,
            dropped=dropped,
            passed=passed,
            passed_after=self.passed,
        )
        return order, step

    @property
    def passed(self) -> dict[int, dict[int, int]]:
        return self.balances.passed

    def orders(self, shards: Shards) -> Iterator[tuple[ShardRows, RowsOrder | Chunk]]:
        """What is to be made of each shard, and of those that need nothing what stands for it."""
        for info, ranked in shards:
            order, step = self.decide(info, ranked)
            if not ranked.counts.num_samples:
                continue
            written = list(written_pairs(order, self.test_fraction))
            self.rows.update([pair.split for pair in written])
            origin = step.origin(self.chain, self.balances)
            label = ShardRows(info.index, written, step, origin)
            if any(output.example is None for output in self.outputs):
                yield label, msgspec.structs.replace(order, wants_example=True)
                continue
            there = self.splits_there()
            if written and all(pair.split in there for pair in written):
                yield label, rows_there(len(written), there, self.outputs)
            else:
                yield label, msgspec.structs.replace(order, there=there)

    def splits_there(self) -> list[Split]:
        """The splits whose rows so far are in parts that every format has taken over."""
        return [
            split
            for split, num_rows in self.rows.items()
            if all(output.is_there(split, num_rows) for output in self.outputs)
        ]


def beginning(outputs: Sequence[PairOutput]) -> Milestone | None:
    """The last milestone at which all formats can begin."""
    reached = [milestone for output in outputs for milestone in output.reached()]
    reached.sort(key=lambda milestone: milestone.step.num_shards, reverse=True)
    fit = (one for one in reached if all(output.can_begin(one) for output in outputs))
    return next(fit, None)


def write_pairs(
    decisions: Decisions,
    shards: Shards,
    outputs: Sequence[PairOutput],
    debug: DebugFiles,
    crew: Crew,
) -> None:
    """Write what is kept."""
    answers = crew.answers(decisions.orders(shards))
    for shard, chunks in groupby(answers, key=itemgetter(0)):
        for output in outputs:
            output.note(shard.step, shard.origin)
        left = iter(shard.written)
        for _, chunk in chunks:
            assert isinstance(chunk, Chunk)
            pairs = list(islice(left, chunk.num_pairs))
            if len(pairs) < chunk.num_pairs:
                raise ConservationError(f"shard {shard.number}: a pair was written twice")
            for output in outputs:
                output.take(chunk, pairs)
            debug.write(chunk.debug)
        if next(left, None) is not None:
            raise ConservationError(f"shard {shard.number}: a pair was not written")


def rows_there(num_pairs: int, there: list[Split], outputs: Sequence[PairOutput]) -> Chunk:
    """What stands for a shard none of whose rows are made."""
    refusals: dict[str, list[str | None]] = {output.name: [None] * num_pairs for output in outputs}
    return Chunk(num_pairs=num_pairs, there=there, refusals=refusals)


def take_examples(
    decisions: Decisions, shards: Shards, outputs: Sequence[PairOutput], crew: Crew
) -> None:
    """Make the first row alone, where all that are first are there: cards show it."""
    for info, ranked in shards:
        order, _ = decisions.decide(info, ranked)
        if first := order.written()[:1]:
            one = msgspec.structs.replace(order, pairs=first, reasons=[None], wants_example=True)
            for _, chunk in crew.answers([(None, one)]):
                assert isinstance(chunk, Chunk)
                for output in outputs:
                    output.example = output.example or chunk.examples.get(output.name)
            return
