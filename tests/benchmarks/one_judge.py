"""divide_and_conquer with one model for all three jobs: one load, against one for each job.

    python -m tests.benchmarks.one_judge [--hidden 768] [--layers 8] [--rounds 3] [--out FILE]

A LLaVA of random weights is written once. In a process of its own the engines of all roles are
loaded as a worker loads them: the three paths name that folder, or three copies of it. Prints one
JSON object: seconds (wall and processor) to load, and resident MiB after it beyond those before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from stream_engine.config import STAGES, RunConfig
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import open_run
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.stage_inputs import stage_inputs
from tests.benchmarks.harness import environment
from tests.benchmarks.scale.measuring import memory_of
from tests.models.writers_llava import Shape, random_weights, write_original

COPIES = {"one load": 1, "three loads": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(loaded(*arguments.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments.hidden, arguments.layers, arguments.rounds)
    text = json.dumps({"benchmark": "one_judge", "environment": environment()} | results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def measure(folder: Path, hidden: int, layers: int, rounds: int) -> dict[str, object]:
    """Medians over rounds, the two ways in turn."""
    shape = Shape(hidden, layers, heads=16, kv_heads=16, mlp=4 * hidden)
    weights = random_weights(shape)
    judges = [write_original(folder / f"judge{i}" / "llava", weights) for i in range(3)]
    small = write_original(folder / "instruct" / "llava", random_weights(Shape()))
    num_bytes = sum(path.stat().st_size for path in judges[0].rglob("*") if path.is_file())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COPIES}
    for number in range(rounds):
        for name, copies in list(COPIES.items())[:: 1 if number % 2 else -1]:
            paths = [judges[i % copies] for i in range(3)]
            work_dir = folder / f"run-{number}-{copies}"
            command = [sys.executable, "-m", "tests.benchmarks.one_judge", "--child"]
            command += [str(path) for path in (work_dir, small, *paths)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: round(statistics.median(one[key] for one in each), 2) for key in each[0]}
        for name, each in found.items()
    }
    return {"checkpoint_mib": round(num_bytes / 2**20), "rounds": rounds} | medians


def loaded(work_dir: Path, instruct: Path, *judges: Path) -> dict[str, float]:
    """Load the engines of every role in this process."""
    settings = {
        "pipeline_name": "divide_and_conquer",
        "instruct_model_path": str(instruct),
        "reward_model_path": ",".join(map(str, judges)),
        "device": "cpu",
        "work_dir": str(work_dir),
    }
    config = RunConfig.create(settings)
    pipeline = pipeline_class("divide_and_conquer")(config)
    run_dir = RunDir(work_dir)
    run_dir.root.mkdir(parents=True)
    open_run(run_dir, config, stage_inputs(pipeline))
    engines = LoadedEngines(run_dir, pipeline, Rank(threads_set=True))
    before, started, spent = resident_mib(), time.perf_counter(), time.process_time()
    engines.get(STAGES, keep=STAGES)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - spent,
        "resident_mib": resident_mib() - before,
    }


def resident_mib() -> float:
    return memory_of(os.getpid())[0] / 2**20


if __name__ == "__main__":
    main()
