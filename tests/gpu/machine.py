"""Step `machine`: what it is, and the limits that all shares are taken of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from tests.gpu.runner import ROOT
from tests.gpu.step import Kit

sys.path.insert(0, str(ROOT / "kernels" / "benchmarks"))
from rounds import copy_bandwidth, matmul_flops

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pillow",
    "pyarrow",
    "webdataset",
    "msgspec",
)


def run(kit: Kit) -> None:
    kit.part("versions", versions)
    kit.part("card", lambda: card(kit))
    kit.part("limits", lambda: limits(kit))


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cores": len(os.sched_getaffinity(0))}


def card(kit: Kit) -> dict[str, Any]:
    if kit.rehearse:
        return {"name": "none: a rehearsal on CPU"}
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        told = f"nvidia-smi: {error}"
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "free_GiB": round(free / 2**30, 2),
        "total_GiB": round(total / 2**30, 2),
        "nvidia_smi": told,
    }


def limits(kit: Kit) -> dict[str, float]:
    """The copy bandwidth, read plus written, and the throughput of a large bf16 product."""
    num_bytes, size = (1 << 20, 128) if kit.rehearse else (1 << 30, 8192)
    return {
        "copy_GB_s": round(copy_bandwidth(kit.device, num_bytes) / 1e9, 3),
        "bf16_matmul_TFLOP_s": round(matmul_flops(kit.device, size) / 1e12, 4),
    }


def known_limits(kit: Kit) -> dict[str, float]:
    """What the step `machine` has measured, or measured now."""
    return kit.kept_by("machine").get("limits") or limits(kit)
