"""Results -> answers in order of their scores -> a dataset of answers, without pairs.

One pass over the shards, one question in memory at a time. As a merge does, it checks that every
answer is written or dropped for a reason, publishes when all is done, and leaves a dataset that is
up to date as it is. The caller holds the merge lease.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.config import RunConfig, Stage
from stream_engine.errors import ConservationError
from stream_engine.outputs.card import write_example
from stream_engine.outputs.formats import ranking_class
from stream_engine.outputs.formats.base import SPLITS, RankedAnswer, RankedRow, split_of
from stream_engine.outputs.parquet import Part
from stream_engine.outputs.publication import Publication, remove_older_files
from stream_engine.outputs.ranking_card import ranking_card
from stream_engine.pairs.filters import IMAGE_TAG
from stream_engine.pairs.merge_inputs import MergeInputs, read_inputs
from stream_engine.pairs.merge_report import FormatReport, is_current, read_stats
from stream_engine.pairs.output import Output
from stream_engine.pairs.rankings import as_asked, scored_samples
from stream_engine.pairs.rounds import configs_of_rounds, told_of_rounds
from stream_engine.pairs.statistics import RunStatistics
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.ranking import AnswerTexts, count_words, drop_near_duplicates, words
from stream_engine.records import Sample, SampleRewards, SampleRollouts
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import resolved_sampling
from stream_engine.store import files
from stream_engine.store.base import Location


def write_ranking(
    run_dir: RunDir,
    config: RunConfig,
    pipeline: Pipeline,
    fingerprints: Mapping[Stage, str],
    *,
    format: str,
    folder: Location | None = None,
    number: int | None = None,
    allow_partial: bool = False,
) -> FormatReport:
    """Write the answers of a run in one format, by default into the run directory.

    Args:
        number: the round whose answers are wanted; None: those of all.

    Raises:
        ConfigError: for an unknown format or round, or a folder that holds something else.
        MissingStageError: when a shard has no complete results and that was not allowed.
        ConservationError: when counts do not add up; the old dataset stays as it was.
        ShardReadError: when a shard or result file is damaged.
    """
    ranking_class(format)
    inputs = read_inputs(run_dir, fingerprints)
    configs = configs_of_rounds(run_dir, config, inputs)
    place = run_dir
    if number is not None:
        inputs, place = inputs.of_known_round(number), run_dir.of_round(number)
        config = configs[number]
    inputs.check_complete(allow_partial=allow_partial)
    target = folder or place.export_dir(format)
    made_from = inputs.fingerprint(config, format)
    if is_current(target, inputs, made_from):
        remove_older_files(target)
    else:
        publication = Publication(target)
        with files.scratch_folder(target) as scratch:
            output = RankingOutput(format, publication, scratch, config)
            output.write_all(run_dir, config, inputs)
            told = {"rounds": told_of_rounds(configs, inputs), "fingerprint": made_from}
            output.finish(run_dir, config, pipeline, inputs, told)
            output.publish()
    stats = read_stats(target)
    assert stats is not None, f"{target} was just written"
    return FormatReport(
        folder=str(target),
        written=sum(stats["splits"].values()),
        dropped=stats["ranked"]["dropped"],
        parts=msgspec.convert(stats["parts"], list[Part]),
    )


class RankingOutput(Output):
    """One format of answers in the making."""

    def __init__(
        self, name: str, publication: Publication, scratch: Path, config: RunConfig
    ) -> None:
        self.ranking = ranking_class(name)(
            scratch, max_part_bytes=config.max_part_bytes, rank=config.rank, best=config.best
        )
        super().__init__(name, publication, scratch, self.ranking)
        self.statistics = RunStatistics()
        self.dropped: Counter[str] = Counter()
        self.example: RankedRow | None = None

    def write_all(self, run_dir: RunDir, config: RunConfig, inputs: MergeInputs) -> None:
        """The one pass: every scored sample in order."""
        for info in inputs.shards():
            for sample, rollouts, rewards in scored_samples(run_dir, info):
                self.statistics.add_sample(rollouts, rewards)
                row = ranked_row(sample, rollouts, rewards, config, inputs.round_of(info.index))
                self.dropped += self.ranking.write(row)
                self.example = self.example or row

    def finish(
        self,
        run_dir: RunDir,
        config: RunConfig,
        pipeline: Pipeline,
        inputs: MergeInputs,
        told: Mapping[str, Any],
    ) -> None:
        """Close the files, check the counts, and make card and statistics, which has `told`."""
        parts = self.ranking.close()
        found = self.statistics
        if found.num_samples != inputs.samples["scored"]:
            raise ConservationError(
                f"{found.num_samples} samples were read, the results' headers say "
                f"{inputs.samples['scored']}"
            )
        written = found.num_answers - sum(self.dropped.values())
        num_rows = sum(part.rows for part in parts)
        expected = written if self.ranking.holds_single_answers else found.num_samples
        if num_rows != expected:
            raise ConservationError(
                f"{self.name}: {found.num_answers} answers, {sum(self.dropped.values())} of them "
                f"dropped, make {expected} rows, but the files hold {num_rows}"
            )
        of_all = found.to_dict(pipeline.judge_rates)
        stats: dict[str, Any] = {
            "pipeline": pipeline.name,
            "format": self.name,
            "samples": inputs.samples,
            "missing_shards": inputs.missing,
            **{name: of_all[name] for name in ("answers", "given_pairs", "judge")},
            **told,
            "ranked": {
                "answers": found.num_answers,
                "written": written,
                "dropped": dict(sorted(self.dropped.items())),
            },
            "splits": {
                split: sum(part.rows for part in parts if part.name.startswith(split))
                for split in SPLITS
                if split in self.ranking.parts
            },
        }
        picture = write_example(self.scratch, self.example.sample if self.example else None)
        self.seal(
            stats,
            parts,
            functools.partial(
                ranking_card,
                config,
                ranking=type(self.ranking),
                example=self.example,
                picture=picture,
                resolved_sampling=resolved_sampling(run_dir, inputs.number),
            ),
        )


def ranked_row(
    sample: Sample,
    rollouts: SampleRollouts,
    rewards: SampleRewards,
    config: RunConfig,
    number: int = 1,
) -> RankedRow:
    """The answers of one sample in order of their scores, those without one last; `number` is its
    round's."""
    scores = sorted(rewards.scores, key=lambda score: (-score.score, score.index))
    answers = {answer.index: answer for answer in rollouts.answers}
    texts = AnswerTexts({index: words(answer.text) for index, answer in answers.items()})
    kept = drop_near_duplicates(scores, texts, threshold=config.similarity_threshold)
    single = {score.index for score in kept}

    def unfit(index: int) -> str:
        text = answers[index].text
        if not count_words(text):
            return "empty_answer"
        if IMAGE_TAG in text:
            return "image_tag"
        return "" if index in single else "near_duplicate"

    ranked = [
        RankedAnswer(
            answers[score.index],
            score,
            rank=1 + sum(other.score > score.score for other in scores),
            unfit=unfit(score.index),
        )
        for score in scores
    ]
    scored = {score.index for score in scores}
    ranked += [
        RankedAnswer(answer, None, None, "unscored")
        for answer in rollouts.answers
        if answer.index not in scored
    ]
    split = split_of(sample.key, config.test_fraction)
    return RankedRow(as_asked(sample, rollouts), ranked, split, number)
