"""Results -> candidate pairs -> filters -> length balance -> dataset, statistics and card.

Two passes over the shards in order, one sample in memory at a time. The first counts (balance,
bounds of the margins); the second decides about every pair again, reads the images from the
shards and writes. Both see the same pairs in the same order, since ranking and filters are pure.

A dataset is written in a scratch folder and published when it is complete (outputs/publication.py),
so a killed merge leaves the old one. Its stats.json holds a hash of what it was made from: while
that stands, merging again does nothing. The caller holds the merge lease.

Counts are checked before that: every sample of the shards has a result or a reason, and every
candidate pair is in the dataset or dropped for a reason.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.config import RankingConfig, RunConfig, Stage
from stream_engine.errors import ConservationError
from stream_engine.outputs.card import dataset_card, write_example
from stream_engine.outputs.formats import export_class
from stream_engine.outputs.formats.base import SPLITS, PairRow, split_of
from stream_engine.outputs.publication import Publication, remove_older_rows
from stream_engine.pairs.balance import Balance, length_balance
from stream_engine.pairs.filters import Candidate, split_candidates
from stream_engine.pairs.merge_debug import DebugFiles
from stream_engine.pairs.merge_inputs import MergeInputs, read_complete_inputs, read_inputs
from stream_engine.pairs.merge_report import (
    MergeReport,
    balance_line,
    is_current,
    read_report,
)
from stream_engine.pairs.output import Output
from stream_engine.pairs.statistics import PairStatistics, RunStatistics
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import Sample, SampleRewards, SampleRollouts, ShardInfo
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.run_json import resolved_sampling
from stream_engine.run_dir.shards import read_shard
from stream_engine.store import files as store
from stream_engine.store.base import Location


def merge(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
    *,
    allow_partial: bool = False,
) -> MergeReport:
    """Write the datasets that `config.format` asks for, those that are not up to date.

    Args:
        fingerprints: of each stage; results that others made do not count.
        allow_partial: leave shards without complete results out, and name them.

    Raises:
        ConfigError: for an unknown format.
        MissingStageError: when a shard has no complete results and that was not allowed.
        ConservationError: when counts do not add up; the old dataset stays as it was.
        ShardReadError: when a shard or result file is damaged.
    """
    folders = run_dir.dataset_folders(config.format)
    return write_formats(
        run_dir, config, pipeline, fingerprints, folders, allow_partial=allow_partial
    )


def export(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
    *,
    format: str,
    folder: Location | None = None,
    allow_partial: bool = False,
) -> MergeReport:
    """Write the pairs of a run in one more format, by default into the run directory.

    Raises:
        ConfigError: for an unknown format, or a folder that holds something else.
        Otherwise as `merge`.
    """
    folders = run_dir.dataset_folders(config.format)
    target = folder or folders.get(format, run_dir.export_dir(format))
    return write_formats(
        run_dir, config, pipeline, fingerprints, {format: target}, allow_partial=allow_partial
    )


def merge_is_current(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
) -> bool:
    """Whether every dataset asked for is there, whole, and made from what is there now."""
    inputs = read_inputs(run_dir, fingerprints)
    folders = run_dir.dataset_folders(config.format)
    return all(
        is_current(folder, inputs, inputs.fingerprint(config, pipeline, name))
        for name, folder in folders.items()
    )


def write_formats(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
    folders: Mapping[str, Location],
    *,
    allow_partial: bool,
) -> MergeReport:
    """Bring each format's folder up to date."""
    for name in folders:
        export_class(name)
    inputs = read_complete_inputs(run_dir, fingerprints, allow_partial=allow_partial)
    made_from = {name: inputs.fingerprint(config, pipeline, name) for name in folders}
    stale = [name for name in folders if not is_current(folders[name], inputs, made_from[name])]
    for name in folders.keys() - set(stale):
        remove_older_rows(folders[name])
    if stale:
        with ExitStack() as stack:
            outputs = [
                PairOutput(
                    name,
                    Publication(folders[name]),
                    stack.enter_context(store.scratch_folder(folders[name])),
                    config,
                )
                for name in stale
            ]
            common = build(run_dir, config, pipeline, inputs, outputs)
            for output in outputs:
                output.finish(config, {**common, "fingerprint": made_from[output.name]})
            for output in outputs:
                output.publish()
    return read_report(folders, is_new=bool(stale))


class PairOutput(Output):
    """One format of pairs in the making."""

    def __init__(
        self, name: str, publication: Publication, scratch: Path, config: RunConfig
    ) -> None:
        self.export = export_class(name)(scratch, max_part_bytes=config.max_part_bytes)
        super().__init__(name, publication, scratch, self.export)
        self.dropped: Counter[str] = Counter()
        self.statistics = PairStatistics()
        self.splits: Counter[str] = Counter()
        self.example: PairRow | None = None

    def write(self, row: PairRow, candidate: Candidate) -> str | None:
        """Write a row; returns the reason when this format cannot express it."""
        reason = self.export.write(row)
        if reason is None:
            self.statistics.add_pair(candidate)
            self.splits[row.split] += 1
            self.example = self.example or row
        else:
            self.dropped[reason] += 1
        return reason

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
            "splits": {split: self.splits[split] for split in SPLITS if self.splits[split]},
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


def build(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    inputs: MergeInputs,
    outputs: list[PairOutput],
) -> dict[str, Any]:
    """Both passes; returns what the statistics of all formats have in common."""
    ranking = config.part(RankingConfig)
    balance = length_balance(pipeline.length_balance, ranking)
    statistics = RunStatistics()
    count_pairs(run_dir, pipeline, ranking, inputs, balance, statistics)
    for output in outputs:
        output.statistics.set_margin_bounds(statistics.least_margin, statistics.greatest_margin)
    with DebugFiles(run_dir.debug_dir if config.debug else None) as debug:
        dropped = write_pairs(run_dir, pipeline, config, inputs, balance, outputs, debug)
    if statistics.num_samples != inputs.samples["scored"]:
        raise ConservationError(
            f"{statistics.num_samples} samples were read, the results' headers say "
            f"{inputs.samples['scored']}"
        )
    return {
        "pipeline": pipeline.name,
        "samples": {
            **inputs.samples,
            "with_candidates": statistics.num_samples_with_candidates,
        },
        "missing_shards": inputs.missing,
        "pairs": {"candidates": statistics.num_candidates, "dropped": dropped},
        **statistics.to_dict(pipeline.judge_rates),
        "resolved_sampling": resolved_sampling(run_dir),
    }


def count_pairs(
    run_dir: RunDir,
    pipeline: Pipeline,
    ranking: RankingConfig,
    inputs: MergeInputs,
    balance: Balance,
    statistics: RunStatistics,
) -> None:
    """First pass: let balance and statistics see every answer and every pair that passes."""
    for info in inputs.shards():
        for rollouts, rewards in scored_answers(run_dir, info):
            candidates = rank(pipeline, rollouts, rewards)
            statistics.add_sample(rollouts, rewards, num_candidates=len(candidates))
            kept, _ = split_candidates(candidates, ranking)
            for candidate in kept:
                balance.count(candidate)
                statistics.add_pair(candidate)


def write_pairs(
    run_dir: RunDir,
    pipeline: Pipeline,
    config: RunConfig,
    inputs: MergeInputs,
    balance: Balance,
    outputs: list[PairOutput],
    debug: DebugFiles,
) -> Counter[str]:
    """Second pass: write what is kept; returns the reasons of what no format gets."""
    all_dropped: Counter[str] = Counter()
    ranking = config.part(RankingConfig)
    for info in inputs.shards():
        for sample, rollouts, rewards in scored_samples(run_dir, info):
            candidates = rank(pipeline, rollouts, rewards)
            debug.ranked(sample, rollouts, rewards)
            kept, dropped = split_candidates(candidates, ranking)
            split = split_of(sample.key, config.test_fraction)
            for candidate in kept:
                reason = balance.reason_to_drop(candidate)
                if reason is not None:
                    dropped.append((candidate, reason))
                    continue
                row = PairRow(
                    as_asked(sample, rollouts),
                    candidate.chosen,
                    candidate.rejected,
                    candidate.pair,
                    rollouts.num_prompt_tokens,
                    split,
                )
                refusals = {output.name: output.write(row, candidate) for output in outputs}
                debug.written(sample, candidate, refusals)
            for candidate, reason in dropped:
                all_dropped[reason] += 1
                debug.dropped(sample, candidate, reason)
    return all_dropped


def as_asked(sample: Sample, rollouts: SampleRollouts) -> Sample:
    """The sample with its question in the words that the instruct model was asked."""
    return msgspec.structs.replace(sample, question=rollouts.asked) if rollouts.asked else sample


def rank(pipeline: Pipeline, rollouts: SampleRollouts, rewards: SampleRewards) -> list[Candidate]:
    """The pipeline's candidate pairs with their answers, found by index."""
    answers = {answer.index: answer for answer in rollouts.answers}
    return [
        Candidate(pair, answers[pair.chosen], answers[pair.rejected])
        for pair in pipeline.pairs_of(rollouts, rewards)
    ]


def scored_answers(
    run_dir: RunDir, info: ShardInfo
) -> Iterator[tuple[SampleRollouts, SampleRewards]]:
    """The samples of a shard that have a result of both stages, joined by key, in order."""
    rollouts = read_results(run_dir.result("rollouts", info.index), SampleRollouts)
    for rewards in read_results(run_dir.result("rewards", info.index), SampleRewards):
        answers = next((record for record in rollouts if record.key == rewards.key), None)
        if answers is None:
            raise ConservationError(
                f"shard {info.index}: the scores of {rewards.key} have no answers, or are out of "
                "order"
            )
        yield answers, rewards


def scored_samples(
    run_dir: RunDir, info: ShardInfo
) -> Iterator[tuple[Sample, SampleRollouts, SampleRewards]]:
    """The same with the samples themselves, read from the shard."""
    samples = read_shard(run_dir.shard(info.index), info)
    for rollouts, rewards in scored_answers(run_dir, info):
        sample = next((sample for sample in samples if sample.key == rollouts.key), None)
        if sample is None:
            raise ConservationError(
                f"shard {info.index}: the answers to {rollouts.key} have no sample, or are out of "
                "order"
            )
        yield sample, rollouts, rewards
