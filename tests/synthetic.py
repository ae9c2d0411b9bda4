"""Synthetic records, and whole runs of them: what stands before a merge, without any model."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stream_engine.config import ModelRole, RunConfig, Stage
from stream_engine.pairs.merge_report import MergeReport
from stream_engine.pairs.merger import merge
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.ranking import rank_by_reward
from stream_engine.records import (
    Answer,
    AnswerScore,
    EncodedImage,
    Failure,
    PreferencePair,
    PromptDigest,
    Sample,
    SampleRewards,
    SampleRollouts,
    ShardInfo,
    sample_key,
)
from stream_engine.run_dir.manifest import InputInfo, Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import ResultHeader, write_results
from stream_engine.run_dir.shards import write_shard
from stream_engine.store import files

FINGERPRINTS: dict[Stage, str] = {"rollouts": "f" * 16, "rewards": "e" * 16}
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "green",
    "round",
    "large",
    "circle",
    "square",
    "left",
    "of",
    "is",
)
NUM_PROMPT_TOKENS = 12


class SyntheticPipeline(Pipeline):
    """Ranks as dpo_reward does; its answers and scores are made by `write_run`."""

    name = "synthetic"

    def roles(self) -> tuple[ModelRole, ...]:
        return ()

    def settings(self, stage: Stage) -> dict[str, Any]:
        return {"stage": stage}

    def rollouts(
        self, engines: Mapping[str, Any], samples: Sequence[Sample], ahead: Iterable[Sample] = ()
    ) -> Iterator[SampleRollouts | Failure]:
        return (synthetic_rollouts(sample, self.config.sample_k) for sample in samples)

    def rewards(
        self, engines: Mapping[str, Any], samples: Sequence[tuple[Sample, SampleRollouts]]
    ) -> Iterator[SampleRewards | Failure]:
        return (synthetic_rewards(rollouts) for _, rollouts in samples)

    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        return rank_by_reward(
            sample.answers,
            rewards,
            rank=self.config.rank,
            distance=self.config.distance,
            strict_follow_rank=self.config.strict_follow_rank,
        )


def png(rng: random.Random, *, size: int = 8) -> bytes:
    """A small picture, different for each state of the generator."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size)).save(buffer, "PNG")
    return buffer.getvalue()


def synthetic_sample(
    number: int, *, num_images: int = 1, image_bytes: int | None = None, question: str = ""
) -> Sample:
    """Sample `number`; its images are PNGs, or random bytes of a given length."""
    rng = random.Random(f"sample {number}")
    images = tuple(
        EncodedImage(png(rng) if image_bytes is None else rng.randbytes(image_bytes), f"{i}.png")
        for i in range(num_images)
    )
    idx = f"idx-{number}"
    question = question or f"What is in picture {number}?"
    return Sample(
        key=sample_key(idx, question, images),
        idx=idx,
        question=question,
        images=images,
        origin_dataset="synthetic",
    )


def synthetic_rollouts(
    sample: Sample, sample_k: int = 10, *, num_words: int = 20
) -> SampleRollouts:
    """Answers of up to `num_words` words, one token a word; the last one is cut off."""
    rng = random.Random(f"answers {sample.key}")
    answers = []
    for index in range(sample_k):
        text = [rng.choice(WORDS) for _ in range(rng.randrange(1, num_words + 1))]
        stopped = index < sample_k - 1
        answers.append(
            Answer(
                index=index,
                text=" ".join(text),
                token_ids=[WORDS.index(word) for word in text],
                token_logps=[-rng.random() for _ in text],
                finish_reason="stop" if stopped else "length",
                end_token_id=2 if stopped else None,
                end_logp=-0.5 if stopped else None,
            )
        )
    return SampleRollouts(
        key=sample.key,
        prompt=PromptDigest("ids", "pixels", "tokenizer"),
        answers=answers,
        num_prompt_tokens=NUM_PROMPT_TOKENS,
    )


def synthetic_rewards(rollouts: SampleRollouts) -> SampleRewards:
    """A random score for each answer but the first, which could not be scored."""
    rng = random.Random(f"scores {rollouts.key}")
    scores = []
    for answer in rollouts.answers[1:]:
        total = rng.uniform(-3.0, 3.0)
        components = {"sum": total, "avg": total + rng.uniform(-0.2, 0.2)}
        scores.append(AnswerScore(index=answer.index, score=total, scores=components))
    return SampleRewards(
        key=rollouts.key,
        scores=scores,
        unscored={"no_tokens": [0]},
        judge={"verdicts": 4.0, "flips": 1.0},
    )


def write_run(
    run_dir: RunDir,
    samples: Sequence[Sample] | Iterator[Sample],
    *,
    samples_per_shard: int = 8,
    sample_k: int = 10,
    num_words: int = 20,
    fail_rollouts: Sequence[str] = (),
    fail_rewards: Sequence[str] = (),
) -> Manifest:
    """Shards, manifest and both stages' results. `fail_*` are the idx of quarantined samples."""
    manifest = Manifest.load(run_dir)
    batch: list[Sample] = []
    num_samples = 0

    def flush() -> None:
        index = len(manifest.shards)
        info = write_shard(run_dir.shard(index), index, batch)
        manifest.append_shard(info, source="synthetic")
        rollouts = [
            synthetic_rollouts(sample, sample_k, num_words=num_words)
            for sample in batch
            if sample.idx not in fail_rollouts
        ]
        failed = [s for s in batch if s.idx in fail_rollouts]
        write_stage(run_dir, info, "rollouts", rollouts, failed)
        answered = [s for s in batch if s.idx not in fail_rollouts]
        failed = [s for s in answered if s.idx in fail_rewards]
        failed_keys = {s.key for s in failed}
        rewards = [synthetic_rewards(r) for r in rollouts if r.key not in failed_keys]
        write_stage(run_dir, info, "rewards", rewards, failed)
        batch.clear()

    for sample in samples:
        batch.append(sample)
        num_samples += 1
        if len(batch) == samples_per_shard:
            flush()
    if batch:
        flush()
    manifest.append_input(
        InputInfo(
            source="synthetic",
            fingerprint="",
            settings="",
            read=num_samples,
            added=num_samples,
            known=0,
        )
    )
    return manifest


def write_stage(
    run_dir: RunDir,
    info: ShardInfo,
    stage: Stage,
    records: Sequence[Any],
    failed: Sequence[Sample] = (),
) -> None:
    """One shard's result file of one stage."""
    header = ResultHeader(
        stage=stage,
        shard=info.index,
        shard_sha256=info.sha256,
        fingerprint=FINGERPRINTS[stage],
        num_samples=len(records) + len(failed),
        num_results=len(records),
        num_quarantined=len(failed),
    )
    failures = [
        Failure(reason="synthetic", stage=stage, key=sample.key, idx=sample.idx)
        for sample in failed
    ]
    over = files.version_of(run_dir.result(stage, info.index))
    write_results(run_dir, header, records, failures, over=over)


def write_example_run(root: Path) -> RunDir:
    """20 samples in 3 shards; idx-3 and idx-12 failed at a stage each, idx-5 has no image."""
    run_dir = RunDir(root)
    samples = [synthetic_sample(i, num_images=0 if i == 5 else 1) for i in range(20)]
    write_run(run_dir, samples, fail_rollouts=["idx-3"], fail_rewards=["idx-12"])
    return run_dir


def run_merge(run_dir: RunDir, *, allow_partial: bool = False, **settings: object) -> MergeReport:
    """Merge a synthetic run under these settings."""
    config = RunConfig.create(dict(settings))
    pipeline = SyntheticPipeline(config)
    return merge(run_dir, config, pipeline, FINGERPRINTS, allow_partial=allow_partial)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a merged dataset."""
    parts = sorted(folder.glob("train-*-of-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
