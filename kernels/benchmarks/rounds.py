"""Interleaved timing, ratios within rounds, and extra peak memory; knows no kernel."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch

# The smallest shapes of each list, or such that Triton's interpreter takes too.
Size = Literal["full", "quick", "tiny"]
# A form takes the number of the call, so that it can rotate among inputs larger than a cache.
Form = Callable[[int], object]
ShapeT = TypeVar("ShapeT")


def interleave(
    forms: Mapping[str, Form], *, rounds: int, device: str, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of each form in each round; forms take turns, in alternating order.

    On CPU with one thread these are seconds of the processor: on a machine that others use too,
    waiting for a turn says nothing of the code. With more threads they are the clock's.
    """
    timer = _cuda_seconds if device == "cuda" else _cpu_seconds
    prepared = {name: _prepare(form, device, calls) for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(rounds):
        for name in list(forms)[:: 1 if index % 2 == 0 else -1]:
            times[name].append(timer(prepared[name]) / calls)
    return times


def of_size(shapes: Sequence[ShapeT], tiny: ShapeT, size: Size, *, quick: int) -> Sequence[ShapeT]:
    """The shapes to measure: all, the `quick` first, or a tiny one."""
    return [tiny] if size == "tiny" else shapes[: quick if size == "quick" else None]


def ratio(times: Mapping[str, list[float]], name: str, *bases: str) -> dict[str, float]:
    """`name` over the fastest of `bases`, round by round: median and range."""
    fastest = [min(each) for each in zip(*(times[base] for base in bases), strict=True)]
    ratios = [mine / base for mine, base in zip(times[name], fastest, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each form, for orientation."""
    return {name: round(statistics.median(each) * 1e3, 4) for name, each in times.items()}


def extra_mib(form: Form, device: str) -> float:
    """Peak memory of one call beyond what was there, in MiB: resident memory, or CUDA's own."""
    form(0)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        form(0)
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
    before_kib = _status_kib("VmRSS")
    form(0)
    return round((_status_kib("VmHWM") - before_kib) / 1024, 1)


def copy_bandwidth(device: str = "cuda", num_bytes: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a copy within a device."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave(
        {"copy": lambda call: target.copy_(source)}, rounds=10, device=device, calls=5
    )
    return 2 * num_bytes / statistics.median(times["copy"])


def matmul_flops(device: str = "cuda", size: int = 8192) -> float:
    """Operations a second of the library's bfloat16 product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    times = interleave(
        {"product": lambda call: torch.mm(a, b, out=out)}, rounds=10, device=device, calls=5
    )
    return 2 * size**3 / statistics.median(times["product"])


def _prepare(form: Form, device: str, calls: int) -> Callable[[], None]:
    """`calls` calls in a row, warmed up; on CUDA as one graph, so that no launch gap counts."""

    def run() -> None:
        for call in range(calls):
            form(call)

    run()
    if device != "cuda":
        return run
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # this form waits for the device or allocates outside the pool
        torch.cuda.synchronize()
        return run
    return graph.replay


def _cpu_seconds(run: Callable[[], None]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    return clock() - started


def _cuda_seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
