"""python -m tests.benchmarks [NAME ...] [--shape L] [--rounds 5] [--threads 2]

Prints one JSON object a benchmark. Ratios are measured inside one run, variants interleaved; do
not compare absolute times of different runs. Without names, the quick ones run.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import scheduling, whole
from tests.benchmarks.harness import report
from tests.benchmarks.synthetic import SHAPES

Arguments = argparse.Namespace
BENCHMARKS: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "counts": lambda a: whole.counts(a.shape),
    "generate": lambda a: whole.generation(a.shape, a.rounds),
    "score": lambda a: whole.scoring(a.shape, a.rounds),
    "end_to_end": lambda a: whole.end_to_end(a.shape, a.rounds, a.questions, not a.engine_only),
    "refill": lambda a: scheduling.refill("tiny"),
    "decode_step": lambda a: scheduling.decode_step(a.shape, a.rows),
    "workers": lambda a: scheduling.workers(a.shape, rounds=a.rounds),
}
KERNELS = ("linear_logp", "prefix_attention", "sampler")
"""Those of kernels/benchmarks/, run with the remaining arguments."""
QUICK = ("counts", "refill", "score")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{[*BENCHMARKS, *KERNELS]}")
    parser.add_argument("--shape", default="S", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--engine-only", action="store_true")
    arguments, rest = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or QUICK:
        if name == "worker":
            scheduling.worker(arguments.shape)
        elif name in KERNELS:
            scripts = Path(__file__).parents[2] / "kernels" / "benchmarks"
            flags = ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
            sys.argv = [str(scripts), name, *flags, *rest]
            runpy.run_path(str(scripts), run_name="__main__")
        elif name in BENCHMARKS:
            report(name, BENCHMARKS[name](arguments))
        else:
            parser.error(f"unknown benchmark {name!r}; choose from {[*BENCHMARKS, *KERNELS]}")


if __name__ == "__main__":
    main()
