"""Time, peak memory and size of a report of P and 10 P pairs.

    python -m tests.benchmarks.memory_report [--pairs 20000] [--workdir DIR]

Builds two synthetic runs (a JPEG of 640 x 480 a question, ten answers with log-probs per token of
both models), reports each in a process of its own and prints one JSON object. `growth_percent` is
the relative growth of the peak; the promise is less than 15. Peaks are the kernel's VmHWM.

Measured: 200,000 pairs take 175 s on one core, 267 MiB of memory (as much as 20,000) and
45 MB on disk.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.memory_merge import ROOT, peak_mib

FACTOR = 10
LIMIT_PERCENT = 15.0
WORDS = 60
PER_SHARD = 128
PAIRS_PER_QUESTION = 3
NUM_PICTURES = 64


def build(folder: Path, num_pairs: int) -> None:
    """A run of about so many pairs."""
    import msgspec

    from stream_engine.records import EncodedImage, Sample, sample_key
    from stream_engine.run_dir.manifest import Manifest
    from stream_engine.run_dir.paths import RunDir
    from stream_engine.run_dir.shards import write_shard
    from tests.synthetic import synthetic_rewards, synthetic_rollouts, write_stage

    run_dir = RunDir(folder)
    manifest = Manifest.load(run_dir)
    pictures = list(jpegs(NUM_PICTURES))
    num_samples = num_pairs // PAIRS_PER_QUESTION

    def sample(number: int) -> Sample:
        images = (EncodedImage(pictures[number % NUM_PICTURES], "a.jpg"),)
        idx, question = f"idx-{number}", f"What is in picture {number}?"
        key = sample_key(idx, question, images)
        source = f"source {number % 5}"
        return Sample(key=key, idx=idx, question=question, images=images, ds_name=source)

    for index, first in enumerate(range(0, num_samples, PER_SHARD)):
        samples = [sample(n) for n in range(first, min(num_samples, first + PER_SHARD))]
        info = write_shard(run_dir.shard(index), index, samples)
        manifest.append_shard(info, source="synthetic")
        rollouts = [synthetic_rollouts(one, num_words=WORDS) for one in samples]
        write_stage(run_dir, info, "rollouts", rollouts)
        rewards = []
        for one in rollouts:
            scored = synthetic_rewards(one)
            logps = {answer.index: answer.scored_logps for answer in one.answers}
            scores = [
                msgspec.structs.replace(score, token_logps=logps[score.index])
                for score in scored.scores
            ]
            rewards.append(msgspec.structs.replace(scored, scores=scores))
        write_stage(run_dir, info, "rewards", rewards)


def jpegs(count: int) -> Iterator[bytes]:
    """Photographs of nothing: smooth noise, as large as a photograph is."""
    from PIL import Image

    for number in range(count):
        rng = random.Random(number)
        small = Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3))
        buffer = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def report(folder: Path, num_rows: int) -> dict[str, Any]:
    """Report in this process; returns its time, peak memory and what it wrote."""
    from stream_engine.config import RunConfig
    from stream_engine.report.run import ReportedRun
    from stream_engine.report.site import write_report
    from stream_engine.run_dir.paths import RunDir
    from tests.synthetic import FINGERPRINTS, SyntheticPipeline

    config = RunConfig.create({"max_pairs_per_sample": PAIRS_PER_QUESTION, "distance": 1000})
    run = ReportedRun.of(RunDir(folder), config, SyntheticPipeline(config), FINGERPRINTS)
    made = write_report(run, num_rows=num_rows)
    return {
        "pairs": made.num_pairs,
        "shown": made.num_shown,
        "seconds": round(made.seconds, 1),
        "megabytes": round(made.num_bytes / 1e6, 1),
        "rss_peak_mib": peak_mib(),
    }


def child(*arguments: str) -> dict[str, Any]:
    """Run one step in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory_report", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout or "{}")


def measure(num_pairs: int, num_rows: int, folder: Path) -> dict[str, Any]:
    """Both sizes, and how they compare."""
    found: dict[str, Any] = {"rows": num_rows}
    for name, count in (("one", num_pairs), ("ten", FACTOR * num_pairs)):
        child("--build", str(folder / name), "--pairs", str(count))
        found[name] = child("--report", str(folder / name), "--rows", str(num_rows))
    found["again"] = child("--report", str(folder / "ten"), "--rows", str(num_rows))
    growth = 100.0 * (found["ten"]["rss_peak_mib"] / found["one"]["rss_peak_mib"] - 1.0)
    return {**found, "growth_percent": round(growth, 1), "is_flat": growth < LIMIT_PERCENT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--workdir", type=Path, help="where to build the runs; default: temporary")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(args.build, args.pairs)
        return 0
    if args.report:
        print(json.dumps(report(args.report, args.rows)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="memory_report_", dir=args.workdir))
    try:
        result = measure(args.pairs, args.rows, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    return 0 if result["is_flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
