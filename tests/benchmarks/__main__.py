"""python -m tests.benchmarks [NAME ...] [--shape L] [--rounds 5] [--threads 2] [--out FILE]

Prints one JSON object a benchmark. Ratios are measured inside one run, variants interleaved; do
not compare absolute times of different runs. Without names, the quick ones run. Progress goes to
stderr; --out keeps what a run that is cut off had measured. `scale`, `rounds` and `losses` have
flags of their own: `python -m tests.benchmarks scale --help`.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import families, scheduling, whole
from tests.benchmarks.baselines import BASELINES
from tests.benchmarks.harness import Results, rendered
from tests.benchmarks.losses import main as losses
from tests.benchmarks.rounds import main as rounds
from tests.benchmarks.scale.command import main as scale
from tests.benchmarks.synthetic import SHAPES

Arguments = argparse.Namespace
BENCHMARKS: dict[str, Callable[[Arguments, whole.Keep], Results]] = {
    "counts": lambda a, keep: whole.counts(a.shape),
    "generate": lambda a, keep: whole.generation(a.shape, a.rounds, a.questions, keep),
    "score": lambda a, keep: whole.scoring(a.shape, a.rounds, keep),
    "end_to_end": lambda a, keep: whole.end_to_end(
        a.shape,
        a.rounds,
        a.questions,
        a.without,
        keep,
        a.vllm_python if "vllm" in a.others else None,
        a.vllm_compiled,
        dtype=a.dtype and getattr(torch, a.dtype),
    ),
    "families": lambda a, keep: families.families(a.rounds, keep),
    "refill": lambda a, keep: scheduling.refill("tiny"),
    "decode_step": lambda a, keep: scheduling.decode_step(a.shape, a.rows),
    "workers": lambda a, keep: scheduling.workers(a.shape, rounds=a.rounds),
}
KERNELS = ("linear_logp", "prefix_attention", "sampler")
"""Those of kernels/benchmarks/, run with the remaining arguments."""
OWN_FLAGS = {"scale": scale, "rounds": rounds, "losses": losses}
QUICK = ("counts", "refill", "score")


def main() -> None:
    if own := OWN_FLAGS.get((sys.argv[1:2] or [""])[0]):
        own(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{[*BENCHMARKS, *KERNELS]}")
    parser.add_argument("--shape", default="S", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--questions", type=int, default=1, help="at once through the engine")
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of end_to_end")
    parser.add_argument("--with", dest="others", nargs="+", default=[], choices=["vllm"])
    parser.add_argument("--vllm_python", type=Path, help="see tests/benchmarks/with_vllm.py")
    parser.add_argument("--vllm_compiled", action="store_true", help="not in eager mode")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=[*BASELINES, "engine_single", "vllm_cached"]
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here, anew each round")
    arguments, rest = parser.parse_known_args()
    names = arguments.names or QUICK
    if arguments.out and (len(names) > 1 or names[0] not in BENCHMARKS):
        parser.error(f"--out takes one name of {[*BENCHMARKS]}")
    if "vllm" in arguments.others and arguments.vllm_python is None:
        parser.error("--with vllm needs --vllm_python, the Python of an environment with vLLM")
    torch.set_num_threads(arguments.threads)

    def keep(results: Results) -> None:
        if arguments.out:
            arguments.out.write_text(rendered(names[0], results) + "\n")

    for name in names:
        if name == "worker":
            scheduling.worker(arguments.shape)
        elif name in KERNELS:
            scripts = Path(__file__).parents[2] / "kernels" / "benchmarks"
            flags = ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
            sys.argv = [str(scripts), name, *flags, *rest]
            runpy.run_path(str(scripts), run_name="__main__")
        elif name in BENCHMARKS:
            results = BENCHMARKS[name](arguments, keep)
            print(rendered(name, results))
            keep(results)
        else:
            parser.error(f"unknown benchmark {name!r}; choose from {[*BENCHMARKS, *KERNELS]}")


if __name__ == "__main__":
    main()
