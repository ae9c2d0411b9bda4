"""What the store costs: a shard's life, and requests to S3.

    python -m tests.benchmarks.store_cost life [--shards 300]       seconds a shard on a disk
    python -m tests.benchmarks.store_cost requests [--shards 1000]  requests of a run on s3://

Prints one JSON object. `requests` runs the echo pipeline of the tests, one sample a shard, against
moto's server through a proxy that counts; the seconds of that are the proxy's and moto's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ECHO = """
import sys
from stream_engine import pipelines
pipelines.PIPELINES["echo"] = "tests.echo_pipeline:EchoPipeline"
from stream_engine.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def life(num_shards: int) -> dict[str, Any]:
    """Lease, read, write both results, release: of shards that lie there."""
    from stream_engine.run_dir.paths import RunDir
    from stream_engine.run_dir.shards import read_shard
    from stream_engine.store.leases import Lease
    from tests.synthetic import (
        synthetic_rewards,
        synthetic_rollouts,
        synthetic_sample,
        write_run,
        write_stage,
    )

    with tempfile.TemporaryDirectory(dir=os.environ.get("WORK")) as folder:
        run_dir = RunDir(Path(folder) / "run")
        samples = (synthetic_sample(i, image_bytes=40_000) for i in range(num_shards * 8))
        manifest = write_run(run_dir, samples, samples_per_shard=8)
        for path in [*run_dir.results_dir("rollouts").iterdir()]:
            path.unlink()
        for path in [*run_dir.results_dir("rewards").iterdir()]:
            path.unlink()
        seconds = 0.0
        for info in manifest.shards:
            started = time.monotonic()
            lease = Lease.acquire(
                run_dir.leases_dir, f"shard-{info.index:06d}", worker_id="w", timeout_s=60
            )
            assert lease is not None
            with lease:
                found = list(read_shard(run_dir.shard(info.index), info))
                seconds += time.monotonic() - started
                rollouts = [synthetic_rollouts(sample, 10, num_words=20) for sample in found]
                rewards = [synthetic_rewards(one) for one in rollouts]
                started = time.monotonic()
                lease.verify()
                write_stage(run_dir, info, "rollouts", rollouts)
                lease.verify()
                write_stage(run_dir, info, "rewards", rewards)
            seconds += time.monotonic() - started
        return {"shards": num_shards, "ms_a_shard": round(1000 * seconds / num_shards, 2)}


def requests(num_shards: int) -> dict[str, Any]:
    """Requests by method, of a run and of one that finds nothing to do."""
    from tests.conftest import write_questions
    from tests.s3 import FaultyProxy, in_environment, s3_server

    with tempfile.TemporaryDirectory() as folder, s3_server() as server:
        questions = [f"what is number {i} for" for i in range(num_shards)]
        dataset = write_questions(Path(folder) / "q.jsonl", questions)
        words = [sys.executable, "-c", ECHO, "run", "--pipeline_name", "echo"]
        words += ["--samples_per_shard", "1", "--sample_k", "6", "--rank", "2"]
        words += ["--dataset_path", str(dataset), "--work_dir", "s3://bucket/run"]
        found: dict[str, Any] = {"shards": num_shards}
        for name in ("run", "again"):
            with FaultyProxy(server, lambda *_: "") as proxy:
                started = time.monotonic()
                env = {**in_environment(proxy.address), "OMP_NUM_THREADS": "1"}
                subprocess.run(words, env=env, check=True, stdout=subprocess.DEVNULL)
                found[name] = {
                    "seconds": round(time.monotonic() - started, 1),
                    "requests": sum(proxy.counts.values()),
                    "a_shard": round(sum(proxy.counts.values()) / num_shards, 2),
                    **dict(sorted(proxy.counts.items())),
                }
        return found


MEASURES = {"life": (life, 300), "requests": (requests, 1000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MEASURES)
    parser.add_argument("--shards", type=int)
    arguments = parser.parse_args()
    measure, default = MEASURES[arguments.name]
    print(json.dumps({arguments.name: measure(arguments.shards or default)}))


if __name__ == "__main__":
    main()
