"""Peak memory of a merge for N and 10 N samples.

    python -m tests.benchmarks.memory_merge [--samples 600] [--workdir DIR]

Builds two synthetic runs (shards and results of both stages), merges each in a process of its own
and prints one JSON object. `growth` is the relative growth of the peak, in percent; the promise is
less than 15. Peaks are the kernel's VmHWM of the merging process; `rss_import_mib` is that of one
that only imports what a merge imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FACTOR = 10
LIMIT_PERCENT = 15.0
IMAGE_BYTES = 40_000
WORDS = 60


def build(folder: Path, num_samples: int) -> None:
    """A run of samples with one random image each and ten answers."""
    from stream_engine.run_dir.paths import RunDir
    from tests.synthetic import synthetic_sample, write_run

    samples = (synthetic_sample(i, image_bytes=IMAGE_BYTES) for i in range(num_samples))
    write_run(RunDir(folder), samples, samples_per_shard=64, num_words=WORDS)


def merge(folder: Path) -> dict[str, float]:
    """Merge in this process; returns its peak memory and what it did."""
    from stream_engine.run_dir.paths import RunDir
    from tests.synthetic import run_merge

    started = time.monotonic()
    report = run_merge(RunDir(folder), format=("rlaifv", "trl"))
    return {
        "pairs": report.written,
        "seconds": round(time.monotonic() - started, 1),
        "rss_peak_mib": peak_mib(),
    }


def import_only() -> dict[str, float]:
    """Import what a merge imports, and do nothing."""
    for name in ("pyarrow.parquet", "webdataset", "tests.synthetic"):
        importlib.import_module(name)
    return {"rss_import_mib": peak_mib()}


def peak_mib() -> float:
    """Peak resident memory of this process since it began to run this program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise AssertionError("the kernel tells no VmHWM")


def child(*arguments: str) -> dict[str, float]:
    """Run one step in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory_merge", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "{}")


def measure(num_samples: int, folder: Path) -> dict[str, Any]:
    """Both sizes, and how they compare."""
    small, large = folder / "small", folder / "large"
    child("--build", str(small), "--samples", str(num_samples))
    child("--build", str(large), "--samples", str(FACTOR * num_samples))
    one, ten = child("--merge", str(small)), child("--merge", str(large))
    growth = 100.0 * (ten["rss_peak_mib"] / one["rss_peak_mib"] - 1.0)
    return {
        "samples": num_samples,
        "pairs": one["pairs"],
        "seconds": one["seconds"],
        "rss_peak_mib": one["rss_peak_mib"],
        "samples_10x": FACTOR * num_samples,
        "pairs_10x": ten["pairs"],
        "seconds_10x": ten["seconds"],
        "rss_peak_mib_10x": ten["rss_peak_mib"],
        **child("--import_only"),
        "growth_percent": round(growth, 1),
        "is_flat": growth < LIMIT_PERCENT,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--workdir", type=Path, help="where to build the runs; default: temporary")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--import_only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(args.build, args.samples)
        return 0
    if args.merge:
        print(json.dumps(merge(args.merge)))
        return 0
    if args.import_only:
        print(json.dumps(import_only()))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="memory_merge_", dir=args.workdir))
    try:
        result = measure(args.samples, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    return 0 if result["is_flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
