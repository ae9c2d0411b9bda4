"""Results -> candidate pairs -> filters -> length balance -> dataset, statistics and card.

Two passes over the shards in order. The first takes their rankings, which are small numbers a pair
(rankings.py), and counts: balance, bounds of the margins. The second decides about every pair, has
the texts and images of those that stay read (rows.py) and writes. Both see the same pairs in the
same order, since ranking and filters are pure. What a shard takes by itself, other processes do
(helpers.py); what concerns all of them is done here. Parts of the dataset that stands which would
be made again as they are, are copied (reuse.py).

A dataset is written in a scratch folder and published when it is complete (outputs/publication.py),
so a killed merge leaves the old one. Its stats.json holds a hash of what it was made from: while
that stands, merging again does nothing. The caller holds the merge lease.

Counts are checked before that: every sample of the shards has a result or a reason, and every
candidate pair is in the dataset or dropped for a reason.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby, islice, takewhile
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from stream_engine import __version__
from stream_engine.config import OutputConfig, RankingConfig, RunConfig, Stage, fingerprint
from stream_engine.errors import ConservationError
from stream_engine.outputs.formats import export_class
from stream_engine.outputs.formats.base import Split
from stream_engine.outputs.publication import Publication, remove_older_rows
from stream_engine.pairs.balance import Balances
from stream_engine.pairs.helpers import Crew, Ranked, RankOrder
from stream_engine.pairs.merge_debug import DebugFiles
from stream_engine.pairs.merge_inputs import MergeInputs, read_inputs
from stream_engine.pairs.merge_report import (
    MergeReport,
    is_current,
    read_report,
)
from stream_engine.pairs.pair_output import PairOutput
from stream_engine.pairs.rankings import kept_ranking, ranking_settings
from stream_engine.pairs.reuse import Origins, find
from stream_engine.pairs.rounds import configs_of_rounds, told_of_rounds
from stream_engine.pairs.rows import Chunk, RowsOrder, WrittenPair, written_pairs
from stream_engine.pairs.statistics import RunStatistics
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import ShardInfo
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import RankedShard
from stream_engine.run_dir.rounds import resolved_sampling
from stream_engine.store import files as store
from stream_engine.store.base import Location

logger = logging.getLogger(__name__)


def merge(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
    *,
    allow_partial: bool = False,
) -> MergeReport:
    """Write the datasets that `config.format` asks for, those that are not up to date: of all
    rounds, and before that, where there may be several, of each.

    Args:
        fingerprints: of each stage; results that others made do not count.
        allow_partial: leave shards without complete results out, and name them.

    Raises:
        ConfigError: for an unknown format.
        MissingStageError: when a shard has no complete results and that was not allowed.
        ConservationError: when counts do not add up; the old dataset stays as it was.
        ShardReadError: when a shard or result file is damaged.
    """
    inputs = read_inputs(run_dir, fingerprints)
    configs = configs_of_rounds(run_dir, config, inputs)
    write = functools.partial(
        write_formats, run_dir, configs, pipeline, allow_partial=allow_partial
    )
    if len(configs) > 1 or config.questions is not None:
        for number in configs:
            if (part := inputs.of_round(number)).num_shards:
                write(part, run_dir.of_round(number).dataset_folders(config.format))
    return write(inputs, run_dir.dataset_folders(config.format))


def export(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
    *,
    format: str,
    folder: Location | None = None,
    number: int | None = None,
    allow_partial: bool = False,
) -> MergeReport:
    """Write the pairs of a run in one more format, by default into the run directory.

    Args:
        number: the round whose pairs are wanted; None: those of all.

    Raises:
        ConfigError: for an unknown format, or a folder that holds something else.
        Otherwise as `merge`.
    """
    inputs = read_inputs(run_dir, fingerprints)
    configs = configs_of_rounds(run_dir, config, inputs)
    place = run_dir
    if number is not None:
        inputs, place = inputs.of_known_round(number), run_dir.of_round(number)
    folders = place.dataset_folders(config.format)
    target = folder or folders.get(format, place.export_dir(format))
    return write_formats(
        run_dir, configs, pipeline, inputs, {format: target}, allow_partial=allow_partial
    )


def write_formats(
    run_dir: RunDir,
    configs: Mapping[int, RunConfig],
    pipeline: Pipeline,
    inputs: MergeInputs,
    folders: Mapping[str, Location],
    *,
    allow_partial: bool,
) -> MergeReport:
    """Bring each format's folder up to date. `configs` are the settings of each round."""
    for name in folders:
        export_class(name)
    config = configs[inputs.number or len(configs)]
    made_from = {name: inputs.fingerprint(config, name) for name in folders}
    stale = [name for name in folders if not is_current(folders[name], inputs, made_from[name])]
    for name in folders.keys() - set(stale):
        remove_older_rows(folders[name])
    if stale:
        inputs.check_complete(allow_partial=allow_partial)
        logger.info("building pairs from %d shards", inputs.num_shards - len(inputs.missing))
        with ExitStack() as stack:
            outputs = [
                PairOutput(
                    name,
                    Publication(folders[name]),
                    stack.enter_context(store.scratch_folder(folders[name])),
                    config,
                    made_by=fingerprint(inputs.settings(config, name)),
                )
                for name in stale
            ]
            common = build(run_dir, config, pipeline, inputs, outputs)
            common["rounds"] = told_of_rounds(configs, inputs)
            for output in outputs:
                output.finish(config, {**common, "fingerprint": made_from[output.name]})
            for output in outputs:
                output.publish()
    return read_report(folders, is_new=bool(stale))


def build(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    inputs: MergeInputs,
    outputs: list[PairOutput],
) -> dict[str, Any]:
    """Both passes; returns what the statistics of all formats have in common."""
    ranking = config.part(RankingConfig)
    balances = Balances(pipeline.length_balance, ranking, inputs.round_of)
    statistics = RunStatistics()
    formats = [output.name for output in outputs]
    scored = inputs.samples["scored"]
    settings = config.part(OutputConfig)
    with Crew(run_dir, pipeline, settings, formats, num_samples=scored) as crew:
        for info, ranked in rankings(kept_rankings(run_dir, pipeline, inputs), crew):
            statistics.add_shard(ranked)
            for pair in ranked.pairs:
                balances.of(info.index).count(pair)
        if not config.debug:  # its lines are made with the rows
            keep_parts(config, kept_rankings(run_dir, pipeline, inputs), balances, outputs)
        bounds = statistics.least_margin, statistics.greatest_margin
        for output in outputs:
            output.statistics.set_margin_bounds(*bounds)
        folder = run_dir.debug_dir if inputs.number is None else None
        with DebugFiles(folder if config.debug else None) as debug:
            shards = rankings_again(kept_rankings(run_dir, pipeline, inputs), crew)
            dropped = write_pairs(config, shards, balances, outputs, debug, crew)
    if statistics.num_samples != scored:
        raise ConservationError(
            f"{statistics.num_samples} samples were read, the results' headers say {scored}"
        )
    return {
        "version": __version__,
        "pipeline": pipeline.name,
        "samples": {
            **inputs.samples,
            "with_candidates": statistics.num_samples_with_candidates,
        },
        "missing_shards": inputs.missing,
        "pairs": {"candidates": statistics.num_candidates, "dropped": dropped},
        **statistics.to_dict(pipeline.judge_rates),
        "resolved_sampling": resolved_sampling(run_dir, inputs.number),
    }


def kept_rankings(
    run_dir: RunDir, pipeline: Pipeline, inputs: MergeInputs
) -> Iterator[tuple[ShardInfo, Ranked | RankOrder]]:
    """The ranking that is kept of each shard, in order; else the order to make it."""
    settings = ranking_settings(pipeline)
    for info in inputs.shards():
        results = inputs.results[info.index]
        kept = kept_ranking(run_dir, info.index, settings=settings, results=results)
        order = RankOrder(info=info, results=results, settings=settings)
        yield info, order if kept is None else Ranked(kept)


def rankings(
    orders: Iterator[tuple[ShardInfo, Ranked | RankOrder]], crew: Crew
) -> Iterator[tuple[ShardInfo, RankedShard]]:
    """The ranking of each shard in order; those that are not kept are made by helpers."""
    for info, answer in crew.answers(orders):
        assert isinstance(answer, Ranked)
        yield info, answer.ranking


def rankings_again(
    orders: Iterator[tuple[ShardInfo, Ranked | RankOrder]], crew: Crew
) -> Iterator[tuple[ShardInfo, RankedShard]]:
    """The same for the second pass, whose rows the helpers make meanwhile: where a ranking could
    not be kept, this process makes it again."""
    for info, order in orders:
        yield info, order.ranking if isinstance(order, Ranked) else crew.rank(order)


def orders_of(
    shards: Iterable[tuple[ShardInfo, RankedShard]], balances: Balances
) -> Iterator[tuple[RankedShard, RowsOrder]]:
    """The decision about every pair, a shard at a time."""
    for info, ranked in shards:
        balance = balances.of(info.index)
        order = RowsOrder(
            info=info,
            results=ranked.results,
            pairs=ranked.pairs,
            reasons=[balance.reason_to_drop(pair) for pair in ranked.pairs],
            round=balances.round_of(info.index),
        )
        yield ranked, order


def keep_parts(
    config: RunConfig,
    kept: Iterator[tuple[ShardInfo, Ranked | RankOrder]],
    balances: Balances,
    outputs: list[PairOutput],
) -> None:
    """Decide about pairs as the second pass will, as long as parts of the old datasets can stay."""
    there = takewhile(lambda one: isinstance(one[1], Ranked), kept)
    shards = ((info, one.ranking) for info, one in there if isinstance(one, Ranked))
    orders = (order for _, order in orders_of(shards, balances.copy()))
    find([output.reuse for output in outputs], orders, config.test_fraction)
    for output in outputs:
        output.keep_parts()


class ShardRows(NamedTuple):
    """A shard, its pairs that are written, and the origin of its rows in each split."""

    number: int
    written: list[WrittenPair]
    origins: dict[Split, str]


def write_pairs(
    config: RunConfig,
    shards: Iterator[tuple[ShardInfo, RankedShard]],
    balances: Balances,
    outputs: list[PairOutput],
    debug: DebugFiles,
    crew: Crew,
) -> Counter[str]:
    """Second pass: write what is kept; returns the reasons of what no format gets."""
    all_dropped: Counter[str] = Counter()

    def orders() -> Iterator[tuple[ShardRows, RowsOrder | Chunk]]:
        origins = Origins()
        for ranked, order in orders_of(shards, balances):
            all_dropped.update(ranked.dropped)
            all_dropped.update([reason for reason in order.reasons if reason is not None])
            if not ranked.counts.num_samples:
                continue
            written = list(written_pairs(order, config.test_fraction))
            origins.add(order, written)
            label = ShardRows(order.info.index, written, dict(origins.of))
            if any(output.example is None for output in outputs):
                yield label, msgspec.structs.replace(order, wants_example=True)
                continue
            there = [
                split
                for split, num_rows in origins.rows.items()
                if all(output.is_there(split, num_rows) for output in outputs)
            ]
            if written and all(pair.split in there for pair in written):
                yield label, rows_there(len(written), there, outputs)
            else:
                yield label, msgspec.structs.replace(order, there=there)

    for shard, chunks in groupby(crew.answers(orders()), key=itemgetter(0)):
        left = iter(shard.written)
        for _, chunk in chunks:
            assert isinstance(chunk, Chunk)
            pairs = list(islice(left, chunk.num_pairs))
            if len(pairs) < chunk.num_pairs:
                raise ConservationError(f"shard {shard.number}: a pair was written twice")
            for output in outputs:
                output.take(chunk, pairs, shard.origins)
            debug.write(chunk.debug)
        if next(left, None) is not None:
            raise ConservationError(f"shard {shard.number}: a pair was not written")
    return all_dropped


def rows_there(num_pairs: int, there: list[Split], outputs: list[PairOutput]) -> Chunk:
    """What stands for a shard none of whose rows are made."""
    refusals: dict[str, list[str | None]] = {output.name: [None] * num_pairs for output in outputs}
    return Chunk(num_pairs=num_pairs, there=there, refusals=refusals)
