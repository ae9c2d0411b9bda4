"""Scored answers of a shard -> its ranking: kept beside the results, or made and kept now.

Workers make it when they finish a shard, and a merge for the shards that lack it. It is used only
if it was made from the very results on hand, under the same settings, by the same code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from stream_engine import __version__, text
from stream_engine.config import RankingConfig, fingerprint
from stream_engine.errors import ChangedError, ConservationError
from stream_engine.pairs import filters
from stream_engine.pairs.filters import Candidate, split_candidates
from stream_engine.pairs.statistics import counts_of
from stream_engine.pipelines import ranking as ranking_module
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import (
    SCHEMA_VERSION,
    Sample,
    SampleRewards,
    SampleRollouts,
    ShardInfo,
)
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import (
    Checksums,
    RankedPair,
    RankedShard,
    checksums,
    keep_ranking,
    read_ranking,
)
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.shards import read_shard

logger = logging.getLogger(__name__)


def ranking_settings(pipeline: Pipeline) -> str:
    """Hash of all that shapes a ranking but the results: settings, versions, the code itself."""
    config, kind = pipeline.config, type(pipeline)
    return fingerprint(
        {
            "version": [__version__, SCHEMA_VERSION],
            "code": [hash_of_code(cls) for cls in kind.__mro__ if cls is not object],
            "rules": [hash_of_code(rules) for rules in (ranking_module, filters, text)],
            "pipeline": f"{kind.__module__}:{kind.__qualname__}",
            "options": config.pipeline_options,
            "seed": config.seed,
            "ranking": msgspec.to_builtins(config.part(RankingConfig)),
        }
    )


@functools.cache
def hash_of_code(code: object) -> str:
    """Hash of the file that a class or a module is written in; empty where it cannot be read."""
    with suppress(OSError, TypeError):
        path = inspect.getsourcefile(code)  # type: ignore[arg-type]
        if path is not None:
            return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    return ""


def kept_ranking(
    run_dir: RunDir, index: int, *, settings: str, results: Checksums
) -> RankedShard | None:
    """The ranking that is kept of a shard, if it is of these settings and these results."""
    ranking = read_ranking(run_dir, index)
    if ranking is None or (ranking.settings, ranking.results) != (settings, results):
        return None
    return ranking


def made_ranking(
    run_dir: RunDir, pipeline: Pipeline, info: ShardInfo, *, settings: str, results: Checksums
) -> RankedShard:
    """Rank a shard, and keep that where it can be kept.

    Raises:
        ChangedError: when a result is not the one that `results` tells.
        ShardReadError: when a result is damaged.
    """
    ranking = rank_shard(run_dir, pipeline, info, settings=settings, results=results)
    try:
        keep_ranking(run_dir, info.index, ranking)
    except (ChangedError, OSError) as error:
        logger.debug("the ranking of shard %d is not kept: %s", info.index, error)
    return ranking


def rank_finished(run_dir: RunDir, pipeline: Pipeline, info: ShardInfo) -> None:
    """Keep the ranking of a shard whose results were just written, unless it is there.

    Raises:
        Exception: whatever a pipeline's ranking raises; the merge will meet it again.
    """
    results, settings = checksums(run_dir, info.index), ranking_settings(pipeline)
    if results is None or kept_ranking(run_dir, info.index, settings=settings, results=results):
        return
    made_ranking(run_dir, pipeline, info, settings=settings, results=results)


def rank_shard(
    run_dir: RunDir, pipeline: Pipeline, info: ShardInfo, *, settings: str, results: Checksums
) -> RankedShard:
    """The ranking of a shard, from its results, one sample in memory at a time."""
    config = pipeline.config.part(RankingConfig)
    places = {key: place for place, key in enumerate(info.keys)}
    pairs: list[RankedPair] = []
    dropped: Counter[str] = Counter()
    num_samples_with_candidates = 0

    def ranked() -> Iterator[tuple[SampleRollouts, SampleRewards]]:
        nonlocal num_samples_with_candidates
        for rollouts, rewards in scored_answers(run_dir, info, results):
            candidates = rank(pipeline, rollouts, rewards)
            kept, others = split_candidates(candidates, config)
            pairs.extend([ranked_pair(places[rollouts.key], candidate) for candidate in kept])
            dropped.update([reason for _, reason in others])
            num_samples_with_candidates += bool(candidates)
            yield rollouts, rewards

    counts = counts_of(ranked())
    return RankedShard(
        settings=settings,
        results=results,
        pairs=pairs,
        dropped=dict(dropped),
        num_samples_with_candidates=num_samples_with_candidates,
        counts=counts,
    )


def ranked_pair(place: int, candidate: Candidate) -> RankedPair:
    """A candidate in numbers; `place` is that of its question in the shard."""
    pair = candidate.pair
    return RankedPair(
        sample=place,
        chosen=pair.chosen,
        rejected=pair.rejected,
        chosen_score=pair.chosen_score,
        rejected_score=pair.rejected_score,
        chosen_words=candidate.chosen_words,
        rejected_words=candidate.rejected_words,
        chosen_finish=candidate.chosen.finish_reason,
        rejected_finish=candidate.rejected.finish_reason,
    )


def rank(pipeline: Pipeline, rollouts: SampleRollouts, rewards: SampleRewards) -> list[Candidate]:
    """The pipeline's candidate pairs with their answers, found by index."""
    answers = {answer.index: answer for answer in rollouts.answers}
    return [
        Candidate(pair, answers[pair.chosen], answers[pair.rejected])
        for pair in pipeline.pairs_of(rollouts, rewards)
    ]


def scored_answers(
    run_dir: RunDir, info: ShardInfo, results: Checksums | None = None
) -> Iterator[tuple[SampleRollouts, SampleRewards]]:
    """The samples of a shard that have a result of both stages, joined by key, in order.

    Args:
        results: the checksums of the very results that are wanted.
    """
    of_rollouts, of_rewards = results or (None, None)
    path = run_dir.result("rollouts", info.index)
    rollouts = read_results(path, SampleRollouts, checksum=of_rollouts)
    path = run_dir.result("rewards", info.index)
    for rewards in read_results(path, SampleRewards, checksum=of_rewards):
        answers = next((record for record in rollouts if record.key == rewards.key), None)
        if answers is None:
            raise ConservationError(
                f"shard {info.index}: the scores of {rewards.key} have no answers, or are out of "
                "order"
            )
        yield answers, rewards


def sample_of(samples: Iterator[Sample], key: str, info: ShardInfo) -> Sample:
    """The next sample of a shard that has this key."""
    sample = next((sample for sample in samples if sample.key == key), None)
    if sample is None:
        raise ConservationError(
            f"shard {info.index}: the answers to {key} have no sample, or are out of order"
        )
    return sample


def scored_samples(
    run_dir: RunDir, info: ShardInfo, results: Checksums | None = None
) -> Iterator[tuple[Sample, SampleRollouts, SampleRewards]]:
    """As `scored_answers`, with the samples themselves, read from the shard."""
    samples = read_shard(run_dir.shard(info.index), info)
    for rollouts, rewards in scored_answers(run_dir, info, results):
        yield sample_of(samples, rollouts.key, info), rollouts, rewards


def as_asked(sample: Sample, rollouts: SampleRollouts) -> Sample:
    """The sample with its question in the words that the instruct model was asked."""
    return msgspec.structs.replace(sample, question=rollouts.asked) if rollouts.asked else sample
