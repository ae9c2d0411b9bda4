"""The pairs of one shard that are to be written -> rows, packed for each format, in any process.

Whoever asks has the numbers of the pairs and has decided about each; here their texts, log-probs
and pictures are read. Answers come some megabytes at a time, so that a shard of large pictures
takes no more memory than another.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import msgspec

from stream_engine.config import OutputConfig, RankingConfig
from stream_engine.errors import ConservationError
from stream_engine.outputs.formats import EXPORTS
from stream_engine.outputs.formats.base import PairRow, Split, split_of
from stream_engine.pairs.filters import split_candidates
from stream_engine.pairs.merge_debug import DebugLines
from stream_engine.pairs.rankings import as_asked, rank, sample_of, scored_samples
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import (
    PreferencePair,
    Sample,
    SampleRollouts,
    ShardInfo,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import Checksums, RankedPair
from stream_engine.run_dir.results import read_results, verify_result
from stream_engine.run_dir.shards import read_shard

CHUNK_BYTES = 4_000_000
"""Of pictures and texts; at a chunk's end it is packed and handed on."""


class RowsOrder(msgspec.Struct, frozen=True, kw_only=True, tag="rows"):
    """What is to be made of a shard: of each pair of its ranking, why it is dropped, or None."""

    info: ShardInfo
    results: Checksums
    pairs: list[RankedPair]
    reasons: list[str | None]
    round: int = 1
    wants_example: bool = False
    """Whether to send the first row of each format itself, for the card to show."""
    there: list[Split] = []
    """Splits whose rows of this shard are written already: none are made."""

    def written(self) -> list[RankedPair]:
        """The pairs that are to be written."""
        return [pair for pair, reason in zip(self.pairs, self.reasons) if reason is None]


class WrittenPair(NamedTuple):
    """A pair that is written, if its format can express it."""

    pair: RankedPair
    key: str
    split: Split
    round: int


def written_pairs(order: RowsOrder, test_fraction: float) -> Iterator[WrittenPair]:
    """The pairs of an order that are to be written."""
    for place, pairs in groupby(order.written(), operator.attrgetter("sample")):
        key = order.info.keys[place]
        split = split_of(key, test_fraction)
        for pair in pairs:
            yield WrittenPair(pair, key, split, order.round)


class Chunk(msgspec.Struct, kw_only=True, tag="chunk"):
    """Some of a shard's rows: those of the next pairs that are to be written."""

    num_pairs: int
    there: list[Split] = []
    """Splits of which there are no rows in it, since they are written already."""
    content: dict[str, bytes] = {}
    """By format, what its `take` wants."""
    refusals: dict[str, list[str | None]] = {}
    """By format and pair, why it cannot be expressed."""
    examples: dict[str, PairRow] = {}
    debug: dict[str, bytes] = {}


class RowMaker:
    """Makes the rows of shards for a merge of these formats."""

    def __init__(
        self, run_dir: RunDir, pipeline: Pipeline, output: OutputConfig, formats: list[str]
    ) -> None:
        self.run_dir = run_dir
        self.pipeline = pipeline
        self.output = output
        self.ranking = pipeline.config.part(RankingConfig)
        self.exports = {name: EXPORTS[name] for name in formats}

    def chunks(self, order: RowsOrder) -> Iterator[Chunk]:
        """A shard's rows in order.

        Raises:
            ChangedError: when a result is not the one that the order tells.
            ConservationError: when a pair has no answers or no sample.
            ShardReadError: when the tar or a result is damaged, read or not.
        """
        debug = DebugLines() if self.output.debug else None
        rows: list[PairRow | None] = []
        num_bytes = 0
        for row in self.rows(order) if debug is None else self.explained(order, debug):
            rows.append(row)
            num_bytes += 0 if row is None else size_of(row)
            if num_bytes > CHUNK_BYTES:
                yield self.chunk(rows, order, debug)
                rows, num_bytes = [], 0
        yield self.chunk(rows, order, debug)

    def chunk(
        self, rows: list[PairRow | None], order: RowsOrder, debug: DebugLines | None
    ) -> Chunk:
        """Rows packed for each format; None stands for one that is written already."""
        chunk = Chunk(num_pairs=len(rows), there=order.there)
        made = [row for row in rows if row is not None]
        for name, export in self.exports.items():
            packed = export.pack(made)
            reasons = iter(packed.refusals)
            chunk.content[name] = packed.content
            chunk.refusals[name] = [None if row is None else next(reasons) for row in rows]
            expressed = (row for row, reason in zip(made, packed.refusals) if reason is None)
            if order.wants_example and (first := next(expressed, None)) is not None:
                chunk.examples[name] = first
        if debug is not None:
            chunk.debug = debug.take(chunk.refusals)
        return chunk

    def rows(self, order: RowsOrder) -> Iterator[PairRow | None]:
        """The rows of the pairs that are to be written, None for those that are; scores are not
        read again."""
        info, (of_rollouts, of_rewards) = order.info, order.results
        path = self.run_dir.result("rollouts", info.index)
        verify_result(self.run_dir.result("rewards", info.index), checksum=of_rewards)
        samples = read_shard(self.run_dir.shard(info.index), info)
        answers = read_results(path, SampleRollouts, checksum=of_rollouts)
        written = order.written()
        for place, pairs in groupby(written, lambda pair: pair.sample):
            key = info.keys[place]
            if order.there and split_of(key, self.output.test_fraction) in order.there:
                yield from (None for _ in pairs)
                continue
            rollouts = next((record for record in answers if record.key == key), None)
            if rollouts is None:
                raise ConservationError(f"shard {info.index}: the pairs of {key} have no answers")
            sample = sample_of(samples, key, info)
            for pair in pairs:
                yield self.row(sample, rollouts, pair, order.round)
        if not written:  # what nothing is taken from must be whole, too
            verify_result(path, checksum=of_rollouts)
            next(samples, None)

    def explained(self, order: RowsOrder, debug: DebugLines) -> Iterator[PairRow]:
        """The same, with lines for a person about every sample and every candidate."""
        reasons = iter(order.reasons)
        scored = scored_samples(self.run_dir, order.info, order.results)
        for sample, rollouts, rewards in scored:
            debug.ranked(sample, rollouts, rewards)
            kept, dropped = split_candidates(rank(self.pipeline, rollouts, rewards), self.ranking)
            for candidate in kept:
                reason = next(reasons, "")
                if reason == "":
                    raise ConservationError(
                        f"shard {order.info.index}: ranked again, it has more pairs than before"
                    )
                if reason is not None:
                    dropped.append((candidate, reason))
                    continue
                debug.expect(sample, candidate)
                yield self.row(sample, rollouts, candidate.pair, order.round)
            for candidate, reason in dropped:
                debug.dropped(sample, candidate, reason)

    def row(
        self,
        sample: Sample,
        rollouts: SampleRollouts,
        pair: RankedPair | PreferencePair,
        number: int,
    ) -> PairRow:
        """One pair, of the round of that number, with its texts and pictures."""
        answers = {answer.index: answer for answer in rollouts.answers}
        return PairRow(
            as_asked(sample, rollouts),
            answers[pair.chosen],
            answers[pair.rejected],
            PreferencePair(
                key=sample.key,
                chosen=pair.chosen,
                rejected=pair.rejected,
                chosen_score=pair.chosen_score,
                rejected_score=pair.rejected_score,
            ),
            rollouts.num_prompt_tokens,
            split_of(sample.key, self.output.test_fraction),
            number,
        )


def size_of(row: PairRow) -> int:
    """About how many bytes a row takes."""
    answers = (row.chosen, row.rejected)
    texts = [row.sample.question, row.sample.metainfos, *(answer.text for answer in answers)]
    num_bytes = sum(map(len, texts)) + sum(len(image.data) for image in row.sample.images)
    return num_bytes + 8 * sum(len(answer.token_logps) for answer in answers)
