"""Timing that survives a noisy machine: variants interleaved in one process, ratios per round.

Every round runs all variants, in alternating order (A B C, C B A); a ratio is taken inside a round
and the median over rounds is what counts. Absolute times are printed for orientation only. With
one CPU thread the times are the processor's, so that what others run does not count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

Variant = Callable[[], Any]
Results = dict[str, Any]
Seconds = dict[str, list[float]]  # of each variant, in each round


def compare(
    variants: Mapping[str, Variant],
    *,
    rounds: int,
    subject: str | Collection[str],
    warm_up: Mapping[str, Variant] | None = None,
    units: Mapping[str, int] | None = None,
    optional: Collection[str] = (),
    keep: Callable[[Results], None] | None = None,
) -> Results:
    """Time the variants interleaved; ratios say how many times slower each is than a subject.

    A variant that returns a dict measured its parts itself, with `timed`: seconds by part, which
    are compared likewise; "whole", where it is among them, stands for the seconds of all (of a
    variant that runs in another process). `units` says how many questions a variant does (1): all
    seconds are per question. One of `optional` that raises is left out from then on, and the
    reason reported. `keep` gets the results so far after every round.
    """
    units = units or {}
    subjects = (subject,) if isinstance(subject, str) else tuple(subject)
    variants = dict(variants)
    whole: Seconds = {name: [] for name in variants}
    parts: dict[str, Seconds] = {}
    peaks = dict.fromkeys(variants, 0)
    missing: dict[str, str] = {}
    results: Results = {}
    for number in range(rounds + 1):
        first = dict(warm_up or {}) if number == 0 else {}
        for name in list(variants)[:: 1 if number % 2 else -1]:
            unit = units.get(name, 1)
            reset_peak()
            try:
                result, elapsed = timed(first.get(name, variants[name]))
            except Exception as error:
                if name not in optional:
                    raise
                missing[name] = f"{type(error).__name__}: {error}"
                for table in (variants, whole, peaks, *parts.values()):
                    table.pop(name, None)
                continue
            if number == 0:
                continue
            spent_on = dict(result) if isinstance(result, dict) else {}
            whole[name].append(spent_on.pop("whole", elapsed) / unit)
            peaks[name] = max(peaks[name], peak_bytes())
            for part, spent in spent_on.items():
                parts.setdefault(part, {}).setdefault(name, []).append(spent / unit)
        if number:
            results = {"rounds": number} | summary(whole, parts, peaks, missing, subjects)
            if keep is not None:
                keep(results)
        now = "  ".join(f"{name} {spent[-1]:.2f}" for name, spent in whole.items() if spent)
        print(f"round {number}/{rounds}  {now or 'warm-up'}", file=sys.stderr, flush=True)
    return results


def summary(
    whole: Seconds,
    parts: Mapping[str, Seconds],
    peaks: Mapping[str, int],
    missing: Mapping[str, str],
    subjects: Collection[str],
) -> Results:
    """What the rounds so far say."""
    return {
        "clock": clock().__name__,
        **compared(whole, subjects),
        "parts": {part: compared(seconds, subjects) for part, seconds in parts.items()},
        "peak_extra_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "not_measured": missing,
    }


def compared(seconds: Seconds, subjects: Collection[str]) -> Results:
    """Medians, and each variant over each subject, round by round."""
    results: Results = {
        "median_seconds": {name: statistics.median(each) for name, each in seconds.items()}
    }
    for subject in subjects:
        results["times_slower_than_" + subject] = {
            name: ratio_summary([a / b for a, b in zip(each, seconds[subject], strict=True)])
            for name, each in seconds.items()
            if name not in subjects
        }
    return results


def clock() -> Callable[[], float]:
    """The processor's time where one CPU thread does all the work, else the wall clock."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if is_alone else time.perf_counter


def timed(work: Variant) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    now = clock()
    start = now()
    result = work()
    synchronize()
    return result, now() - start


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
    """Start counting: on CPU the kernel's high-water mark of this process is reset.

    Freed memory is handed back first: an arena that stays resident would hide what comes next.
    """
    global _base_bytes
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _base_bytes = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
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


def rendered(name: str, results: Results) -> str:
    """One benchmark's JSON object."""
    return json.dumps({"benchmark": name, "environment": environment()} | results, indent=1)
