"""Timing that survives a noisy machine: variants interleaved in one process, ratios per round.

Every round runs all variants one after the other; a ratio is taken inside a round and the median
over rounds is what counts. Absolute times are printed for orientation only.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Variant = Callable[[], Any]


def compare(variants: dict[str, Variant], *, rounds: int, subject: str) -> dict[str, Any]:
    """Time the variants interleaved; ratios say how many times slower each is than `subject`."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int] = {}
    for round_number in range(rounds + 1):
        for name, variant in variants.items():
            reset_peak()
            start = time.perf_counter()
            variant()
            synchronize()
            elapsed = time.perf_counter() - start
            if round_number:  # the first round warms up
                seconds[name].append(elapsed)
                peaks[name] = max(peaks.get(name, 0), peak_bytes())
    return {
        "rounds": rounds,
        "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "times_slower_than_" + subject: {
            name: ratio_summary([a / b for a, b in zip(s, seconds[subject])])
            for name, s in seconds.items()
            if name != subject
        },
        "peak_extra_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
    }


def ratio_summary(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 2),
        "min": round(min(ratios), 2),
        "max": round(max(ratios), 2),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_base_bytes = 0


def reset_peak() -> None:
    """Start counting: on CPU the kernel's high-water mark of this process is reset."""
    global _base_bytes
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _base_bytes = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        _base_bytes = _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Most memory in use since `reset_peak`, above what was in use then."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - _base_bytes
    return max(0, _status_bytes("VmHWM") - _base_bytes)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def environment() -> dict[str, Any]:
    """What a figure depends on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def report(name: str, results: dict[str, Any]) -> None:
    """Print one benchmark's JSON object."""
    print(json.dumps({"benchmark": name, "environment": environment()} | results, indent=1))
