"""Results -> candidate pairs -> filters -> length balance -> dataset, statistics and card.

Two passes over the shards in order. The first takes their rankings, which are small numbers a pair
(rankings.py), and counts: balance, bounds of the margins. The second decides about every pair, has
the texts and images of those that stay read (rows.py) and writes (second_pass.py). Both see the
same pairs in the same order, since ranking and filters are pure. What a shard takes by itself,
other processes do (helpers.py); what concerns all of them is done here. Parts of the dataset that
stands which would be made again as they are, are copied (reuse.py), and both passes go on from what
the last merge had counted, as far as that still holds (milestones.py).

A dataset is written in a scratch folder and published when it is complete (outputs/publication.py),
so a killed merge leaves the old one. Its stats.json holds a hash of what it was made from: while
that stands, merging again does nothing. The caller holds the merge lease.

Counts are checked before that: every sample of the shards has a result or a reason, and every
candidate pair is in the dataset or dropped for a reason.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from stream_engine import __version__
from stream_engine.config import OutputConfig, RankingConfig, RunConfig, Stage, fingerprint
from stream_engine.errors import ConservationError
from stream_engine.outputs.formats import export_class
from stream_engine.outputs.publication import Publication, remove_older_files
from stream_engine.pairs.balance import Balances
from stream_engine.pairs.helpers import Crew, Ranked, RankOrder
from stream_engine.pairs.merge_debug import DebugFiles
from stream_engine.pairs.merge_inputs import MergeInputs, read_inputs
from stream_engine.pairs.merge_report import (
    MergeReport,
    is_current,
    read_report,
)
from stream_engine.pairs.milestones import Counted, chain_of
from stream_engine.pairs.pair_output import PairOutput
from stream_engine.pairs.rankings import kept_ranking, ranking_settings
from stream_engine.pairs.rounds import configs_of_rounds, datasets_of, told_of_rounds
from stream_engine.pairs.second_pass import Decisions, beginning, take_examples, write_pairs
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
    for part, place in datasets_of(run_dir, configs, inputs):
        folders = place.dataset_folders(config.format)
        report = write_formats(
            run_dir, configs, pipeline, part, folders, allow_partial=allow_partial
        )
    return report


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
        remove_older_files(folders[name])
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
                    milestones=run_dir.milestones(name, inputs.number),
                )
                for name in stale
            ]
            common, counted = build(run_dir, config, pipeline, inputs, outputs)
            common["rounds"] = told_of_rounds(configs, inputs)
            for output in outputs:
                output.finish(config, {**common, "fingerprint": made_from[output.name]})
            for output in outputs:
                output.publish()
                output.keep_milestones(counted)
    return read_report(folders, is_new=bool(stale))


def build(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    inputs: MergeInputs,
    outputs: list[PairOutput],
) -> tuple[dict[str, Any], Counted]:
    """Both passes; returns what the statistics of all formats have in common, and the first."""
    balances = Balances(pipeline.length_balance, config.part(RankingConfig), inputs.round_of)
    chain = chain_of(inputs, ranking_settings(pipeline))
    kept = functools.partial(kept_rankings, run_dir, pipeline, inputs)
    formats = [output.name for output in outputs]
    scored = inputs.samples["scored"]
    explains = config.debug and inputs.number is None
    settings = dataclasses.replace(config.part(OutputConfig), debug=explains)
    with Crew(run_dir, pipeline, settings, formats, num_samples=scored) as crew:
        counted = count_all(kept, chain, balances, outputs, crew)
        statistics = counted.statistics
        for output in outputs:
            output.statistics.set_margin_bounds(statistics.least_margin, statistics.greatest_margin)
            if not explains:  # its lines are made with the rows
                output.keep_parts(chain, balances)
        decide = functools.partial(
            Decisions, chain, balances, outputs, test_fraction=config.test_fraction
        )
        if milestone := beginning(outputs):
            take_examples(decide(), rankings_again(kept(), crew), outputs, crew)
            for output in outputs:
                output.begin(milestone)
        with DebugFiles(run_dir.debug_dir if explains else None) as debug:
            decisions = decide(after=milestone)
            shards = rankings_again(kept(decisions.num_shards), crew)
            write_pairs(decisions, shards, outputs, debug, crew)
    if statistics.num_samples != scored:
        raise ConservationError(
            f"{statistics.num_samples} samples were read, the results' headers say {scored}"
        )
    common = {
        "version": __version__,
        "pipeline": pipeline.name,
        "samples": {
            **inputs.samples,
            "with_candidates": statistics.num_samples_with_candidates,
        },
        "missing_shards": inputs.missing,
        "pairs": {"candidates": statistics.num_candidates, "dropped": decisions.dropped},
        **statistics.to_dict(pipeline.judge_rates),
        "resolved_sampling": resolved_sampling(run_dir, inputs.number),
    }
    return common, counted


def count_all(
    kept: Callable[[int], Iterator[tuple[ShardInfo, Ranked | RankOrder]]],
    chain: Sequence[str],
    balances: Balances,
    outputs: list[PairOutput],
    crew: Crew,
) -> Counted:
    """First pass, from where one of the old datasets had come; `balances` count."""
    olds = [old for output in outputs if (old := output.old.counted) and old.holds(chain)]
    old = max(olds, key=lambda one: one.num_shards, default=Counted())
    statistics = old.statistics
    balances.begin_with(old.balances)
    for info, ranked in rankings(kept(old.num_shards), crew):
        statistics.add_shard(ranked)
        balances.of(info.index).count_all(ranked.pairs)
    return Counted(
        num_shards=len(chain) - 1,
        link=chain[-1],
        statistics=statistics,
        balances=balances.counts,
    )


def kept_rankings(
    run_dir: RunDir, pipeline: Pipeline, inputs: MergeInputs, start: int = 0
) -> Iterator[tuple[ShardInfo, Ranked | RankOrder]]:
    """The ranking that is kept of each shard but the first `start`, in order; else the order to
    make it."""
    settings = ranking_settings(pipeline)
    for info in inputs.shards(start):
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
