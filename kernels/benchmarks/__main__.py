"""Time and peak memory of the kernels against named baselines, as ratios; prints one JSON object.

    python kernels/benchmarks linear_logp sampler prefix_attention --threads 1 --rounds 5

The forms of a benchmark take turns within a round, and ratios are taken within a round: a busy
neighbour slows both sides. Absolute times of two runs are not comparable. On a machine with a GPU
the same command measures the CUDA forms (`--device cpu` for the others).
"""

import argparse
import json
import platform
from pathlib import Path

import linear_logp
import prefix_attention
import sampler
import torch
from rounds import copy_bandwidth

BENCHMARKS = {
    "linear_logp": linear_logp.measure,
    "sampler": sampler.measure,
    "prefix_attention": prefix_attention.measure,
}


def main() -> None:
    """Run the named benchmarks and print what they measured."""
    parser = argparse.ArgumentParser(prog="python kernels/benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest shapes only")
    parser.add_argument("--tiny", action="store_true", help="only to see that every form runs")
    parser.add_argument("--out", type=Path, help="also write the JSON here, row by row")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    size = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    report: dict[str, object] = {"environment": environment(arguments.device)}
    for name in arguments.names:
        rows: list[dict[str, object]] = []
        report[name] = rows
        for row in BENCHMARKS[name](arguments.device, arguments.rounds, size):
            rows.append(row)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def environment(device: str) -> dict[str, object]:
    """What the numbers were taken on."""
    found: dict[str, object] = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
    }
    if device == "cuda":
        import triton

        found["gpu"] = torch.cuda.get_device_name()
        found["triton"] = triton.__version__
        found["copy_bandwidth_GB_s"] = round(copy_bandwidth() / 1e9)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


if __name__ == "__main__":
    main()
