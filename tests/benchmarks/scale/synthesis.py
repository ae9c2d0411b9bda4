"""Runs of any size before their merge: tars and results of both stages, by the writers of a run.

Every question, picture (a PNG of 8 x 8 pixels, 280 bytes) and answer is another one, so that no
cache or dictionary helps where it would not help a real run. Nothing is flushed to the disk.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stream_engine.config import RunConfig, Stage
from stream_engine.pipelines.dpo_reward import DPORewardPipeline
from stream_engine.records import (
    Answer,
    AnswerScore,
    EncodedImage,
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

SHARD = 128
SAMPLE_K = 10
MAX_WORDS = 15
FINGERPRINTS: dict[Stage, str] = {"rollouts": "f" * 16, "rewards": "e" * 16}
SOURCE = "synthetic"
SYLLABLES = ("ba", "co", "di", "fu", "ga", "le", "mi", "no", "pa", "ra", "se", "to", "vu", "ze")
VOCABULARY = tuple(a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES)


def config_of(folder: Path, **settings: object) -> RunConfig:
    """The settings of such a run."""
    paths = {"instruct_model_path": "instruct", "reward_model_path": "reward"}
    return RunConfig.create({"work_dir": str(folder), "report": "never", **paths, **settings})


def pipeline_of(config: RunConfig) -> DPORewardPipeline:
    return DPORewardPipeline(config)


def add_questions(folder: Path, num_questions: int, *, processes: int = 2) -> None:
    """Add as many questions to a run, as an input of their own, answered and scored."""
    run_dir = RunDir(folder)
    manifest = Manifest.load(run_dir)
    first_shard = len(manifest.shards)
    first = sum(info.num_samples for info in manifest.shards)
    jobs = [
        (str(folder), first_shard + i, first + start, min(SHARD, num_questions - start))
        for i, start in enumerate(range(0, num_questions, SHARD))
    ]
    with multiprocessing.get_context("spawn").Pool(processes, initializer=flush_nothing) as pool:
        flush_nothing()
        source = f"{SOURCE}-{first_shard}"
        for info in pool.imap(write_one, jobs):
            manifest.append_shard(info, source=source)
    add_input(manifest, source, num_questions)


def repeat_questions(folder: Path, num_questions: int) -> None:
    """Add shards that are the run's own once more, whole ones, until it has as many questions.

    Their files are links. A row group of a dataset spans some 40 shards, so that its dictionaries
    meet no question twice.
    """
    run_dir = RunDir(folder)
    manifest = Manifest.load(run_dir)
    num_known = len(manifest.shards)
    num_present = sum(info.num_samples for info in manifest.shards)
    flush_nothing()
    before = num_present
    while num_present < num_questions:
        index = len(manifest.shards)
        info = manifest.shards[index % num_known]
        os.link(run_dir.shard(info.index), run_dir.shard(index))  # type: ignore[arg-type]
        for stage in FINGERPRINTS:
            old, new = run_dir.result(stage, info.index), run_dir.result(stage, index)
            os.link(old, new)  # type: ignore[arg-type]
        manifest.append_shard(msgspec.structs.replace(info, index=index), source="repeated")
        num_present += info.num_samples
    add_input(manifest, "repeated", num_present - before)


def add_input(manifest: Manifest, source: str, num_rows: int) -> None:
    """Say that an input was read to its end."""
    counts = {"read": num_rows, "added": num_rows, "known": 0}
    manifest.append_input(InputInfo(source=source, fingerprint="read", settings="", **counts))


def flush_nothing() -> None:
    """What is synthesised need not outlast a power cut."""
    os.fsync = lambda descriptor: None


def write_one(job: tuple[str, int, int, int]) -> ShardInfo:
    """One shard and its results."""
    folder, index, first, num_questions = job
    run_dir, rng = RunDir(folder), random.Random(f"shard {index} from {first}")
    info = write_shard(run_dir.shard(index), index, questions(rng, first, num_questions))
    rollouts = [rollouts_of(rng, key) for key in info.keys]
    rewards = [rewards_of(rng, record) for record in rollouts]
    for stage, records in (("rollouts", rollouts), ("rewards", rewards)):
        header = ResultHeader(
            stage=stage,
            shard=index,
            shard_sha256=info.sha256,
            fingerprint=FINGERPRINTS[stage],  # type: ignore[index]
            num_samples=len(records),
            num_results=len(records),
            num_quarantined=0,
        )
        write_results(run_dir, header, records, [], over=None)  # type: ignore[arg-type]
    return info


def questions(rng: random.Random, first: int, count: int) -> Iterator[Sample]:
    """Samples by their number in the run."""
    for number in range(first, first + count):
        images = (EncodedImage(picture(rng), f"{number}.png"),)
        idx, question = f"{number}", f"What is in picture {number}?"
        key = sample_key(idx, question, images)
        yield Sample(key=key, idx=idx, question=question, images=images)


def picture(rng: random.Random, side: int = 8) -> bytes:
    """A PNG of random pixels."""
    rows = b"".join(b"\0" + rng.randbytes(3 * side) for _ in range(side))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def rollouts_of(rng: random.Random, key: str) -> SampleRollouts:
    """Ten answers of up to 15 words, a token a word; some are said again with one word changed."""
    answers: list[Answer] = []
    for index in range(SAMPLE_K):
        ids = rng.choices(range(len(VOCABULARY)), k=rng.randrange(MAX_WORDS - 5, MAX_WORDS + 1))
        if index and rng.random() < 0.2:
            ids = [*answers[-1].token_ids[:-1], ids[0]]
        answers.append(
            Answer(
                index=index,
                text=" ".join([VOCABULARY[i] for i in ids]),
                token_ids=ids,
                token_logps=[-rng.random() for _ in ids],
                finish_reason="stop",
                end_token_id=2,
                end_logp=-0.5,
            )
        )
    prompt = PromptDigest(key[:16], key[16:], "tokenizer")
    return SampleRollouts(key=key, prompt=prompt, answers=answers, num_prompt_tokens=20)


def rewards_of(rng: random.Random, rollouts: SampleRollouts) -> SampleRewards:
    """A score for each answer, longer ones a little better, so that the balance has work."""
    scores = []
    for answer in rollouts.answers:
        logps = [logp + rng.uniform(-1.0, 1.4) for logp in answer.scored_logps]
        rewards = [0.1 * (r - i) for r, i in zip(logps, answer.scored_logps)]
        total = sum(rewards)
        scores.append(
            AnswerScore(
                index=answer.index,
                score=total,
                scores={
                    "sum": total,
                    "avg": total / len(rewards),
                    "min": min(rewards),
                    "orm": rewards[-1],
                },
                token_logps=logps,
            )
        )
    return SampleRewards(key=rollouts.key, scores=scores)
