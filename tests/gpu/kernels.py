"""Step `kernels`: kernels/benchmarks, beside named library calls; a process each."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.gpu.runner import ROOT
from tests.gpu.step import Kit

NAMES = ("prefix_attention", "sampler", "linear_logp")


def run(kit: Kit) -> None:
    for name in NAMES:
        kit.part(name, lambda name=name: benchmark(kit, name), needs_s=10)


def benchmark(kit: Kit, name: str) -> list[dict[str, Any]]:
    """One benchmark's rows; those measured before it failed or ran out of time are kept."""
    out = kit.scratch / f"benchmark_{name}.json"
    command = [sys.executable, "kernels/benchmarks", name, "--device", kit.device, "--out", out]
    command += ["--rounds", "1", "--tiny"] if kit.rehearse else ["--rounds", "5", "--quick"]
    timeout_s = max(5.0, kit.seconds_left - 2)
    try:
        subprocess.run([*map(str, command)], cwd=ROOT, check=True, timeout=timeout_s)
    finally:
        if out.exists():
            kit.keep(**{name: json.loads(out.read_text())[name]})
    return kit.results[name]
