"""refill, decode_step, workers: how full the batch stays, what a step costs, how workers scale."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import Any

import torch

from stream_engine.config import InputConfig
from stream_engine.engine import GenerateRequest, RowRequest, row_seed
from tests.benchmarks.harness import peak_bytes, reset_peak, synchronize
from tests.benchmarks.whole import generate_all, set_up


def refill(name: str) -> dict[str, Any]:
    """Share of decode slots in use on log-normal answer lengths, and what waiting would leave.

    `stream` is a long stream of questions. `shards` is what a worker gives the engine: shards of
    the default size through the batch that the engine chooses, empty at the end of each; in
    `look_ahead` the next shard is begun in the rows that become free.
    `static_occupancy` is what batches that wait for their longest row would reach.
    """
    size = InputConfig().samples_per_shard
    return {
        "shape": name,
        "stream": occupancy(name, calls=1, questions=240, rows=40),
        "shards": occupancy(name, calls=8, questions=size),
        "look_ahead": occupancy(name, calls=8, questions=size, looks_ahead=True),
    }


def occupancy(
    name: str,
    *,
    calls: int,
    questions: int,
    rows: int = 0,
    looks_ahead: bool = False,
    k: int = 10,
    mean: int = 60,
    sigma: float = 0.5,
) -> dict[str, Any]:
    """Of `calls` calls of generate, with so many questions each."""
    s = set_up(name, max_rows=rows, answer_tokens=6 * mean)
    rows = s.engine.runner.budget.rows
    generator = torch.Generator().manual_seed(0)
    total = calls * questions
    lengths = torch.exp(torch.randn(total, k, generator=generator) * sigma + math.log(mean))
    lengths = lengths.round().clamp(1, 6 * mean).long()
    drawn = [
        GenerateRequest(
            str(n),
            s.engine.model.question(n, s.shape.image_tokens + 40),
            tuple(
                RowRequest(row_seed(0, str(n), j), max_new_tokens=int(lengths[n, j]))
                for j in range(k)
            ),
        )
        for n in range(total)
    ]
    shards = [drawn[first : first + questions] for first in range(0, total, questions)]
    s.engine.counters.clear()
    reset_peak()
    for shard, following in zip(shards, [*shards[1:], []], strict=True):
        list(s.engine.generate(shard, following if looks_ahead else ()))
    counters = s.engine.counters
    longest = sum(
        int(batch.max())
        for shard in lengths.split(questions)
        for batch in shard.flatten().split(rows)
    )
    return {
        "calls": calls,
        "questions": questions,
        "rows": rows,
        "occupancy": round(counters["decode_tokens"] / counters["decode_capacity"], 4),
        "static_occupancy": round(float(lengths.sum() / (longest * rows)), 4),
        "decode_steps": counters["decode_steps"],
        "peak_extra_mib": round(peak_bytes() / 2**20, 1),
    }


def decode_step(name: str, rows: list[int], *, tokens: int = 96) -> dict[str, Any]:
    """Milliseconds a decode step, at several batch sizes (k = 10, one prompt a question)."""
    table = {}
    for count in rows:
        s = set_up(name, questions=count // 10, answer_tokens=tokens, max_rows=count)
        generate_all(s)
        s.engine.counters.clear()
        prefill_s = _prefill_seconds(s)
        synchronize()
        start = time.perf_counter()
        generate_all(s)
        synchronize()
        elapsed = time.perf_counter() - start - prefill_s
        steps = s.engine.counters["decode_steps"]
        table[count] = {
            "ms_per_step": round(1e3 * elapsed / steps, 3),
            "tokens_per_second": round(count * steps / elapsed, 1),
        }
        s.engine.close()
        s.reward.close()
        del s
    return {"shape": name, "rows": table}


def _prefill_seconds(s: Any) -> float:
    """Seconds that the same questions take when one token is drawn for each row."""
    full = s.engine.sampling
    s.engine.sampling = type(full)(
        **{name: getattr(full, name) for name in full.__struct_fields__} | {"max_new_tokens": 1}
    )
    generate_all(s)
    synchronize()
    start = time.perf_counter()
    generate_all(s)
    synchronize()
    s.engine.sampling = full
    s.engine.counters.clear()
    return time.perf_counter() - start


def workers(name: str, *, rounds: int = 5) -> dict[str, Any]:
    """Two one-thread workers at once against one alone: throughput ratio per round."""
    command = [sys.executable, "-m", "tests.benchmarks", "worker", "--shape", name]

    def run(count: int) -> float:
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        for process in processes:  # each says "ready" after loading and warming up
            assert process.stdout is not None
            process.stdout.readline()
        start = time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            if process.wait():
                raise RuntimeError(f"a worker exited with {process.returncode}")
        return time.perf_counter() - start

    ratios = []
    for _ in range(rounds):
        alone, both = run(1), run(2)
        ratios.append(2 * alone / both)
    ratios.sort()
    return {"shape": name, "throughput_ratio": ratios[len(ratios) // 2], "all": ratios}


def worker(name: str) -> None:
    """The child of `workers`: load, warm up, wait for the word, work."""
    torch.set_num_threads(1)
    s = set_up(name, questions=2, answer_tokens=60)
    generate_all(s)
    print("ready", flush=True)
    sys.stdin.readline()
    generate_all(s)
