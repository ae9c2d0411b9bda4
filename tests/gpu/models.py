"""Step `models`: random 7B models in bf16, made on the device, and how near they are to its limits.

The shapes are LLaVA-1.5-7B's, and Qwen2.5-VL-7B's language model behind the same tower. Legend: R
rows of a decode step; `floor` is the time that reading weights, keys and values once would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from stream_engine.engine import (
    Engine,
    GenerateRequest,
    ResolvedSampling,
    RowRequest,
    ScoreRequest,
    row_seed,
)
from tests.benchmarks import whole
from tests.benchmarks.synthetic import SHAPES, Shape, SyntheticVLM, build_llava
from tests.gpu.machine import known_limits
from tests.gpu.step import Kit

NAMES = ("llava-7b", "qwen-7b")


@dataclass(frozen=True)
class Sizes:
    """How much is asked of a model."""

    k: int = 10
    tokens: int = 150
    rows: tuple[int, ...] = (10, 80, 320)
    steps: tuple[int, int] = (25, 89)  # tokens an answer: what the second takes longer is decoding
    prefilled: int = 16
    scored: int = 8


LEFT_OUT = (("nrs_best", "continuous"), ("ancestor", "nrs", "continuous"))
"""Other engines that a whole question is not measured with, each time."""
SMALL = Sizes(k=2, tokens=3, rows=(2,), steps=(2, 3), prefilled=2, scored=1)


def run(kit: Kit) -> None:
    names, sizes = (["tiny"], SMALL) if kit.rehearse else (NAMES, Sizes())
    limits = known_limits(kit)
    for name in names:
        kit.part(name, lambda name=name: alone(kit, name, sizes, limits), needs_s=20)
    for others in LEFT_OUT[: 1 if kit.rehearse else 2]:
        for name in names:
            title = f"{name}, a question{', best form' if 'nrs' in others else ''}"
            kit.part(
                title,
                lambda name=name, others=others, title=title: whole.end_to_end(
                    name,
                    rounds=1,
                    without=others,
                    keep=lambda results, title=title: kit.keep(**{title: results}),
                    k=sizes.k,
                    answer_tokens=sizes.tokens,
                ),
                needs_s=30,
            )


def build(kit: Kit, name: str, sizes: Sizes) -> Engine:
    """One random model in an engine that draws."""
    dtype = torch.float32 if kit.rehearse else torch.bfloat16
    model = build_llava(SHAPES[name], device=kit.device, dtype=dtype)
    sampling = ResolvedSampling(
        temperature=0.7, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=sizes.tokens
    )
    return Engine(
        SyntheticVLM(model, SHAPES[name]),
        sampling,
        max_rows=max(sizes.rows),
        rows_per_question=sizes.k,
    )


def alone(kit: Kit, name: str, sizes: Sizes, limits: dict[str, float]) -> dict[str, Any]:
    """Decoding, prefill and scoring of one model that has the card to itself."""
    found: dict[str, Any] = {}

    def keep(**values: Any) -> None:
        found.update(values)
        kit.keep(**{name: found})

    begun = time.perf_counter()
    engine = build(kit, name, sizes)
    keep(seconds_to_build=round(time.perf_counter() - begun, 1))
    for rows in sizes.rows:
        decoded = decode(engine, rows, sizes, limits["copy_GB_s"] * 1e9)
        keep(decode=found.get("decode", {}) | {str(rows): decoded})
    keep(plan=engine.describe()["memory"])
    peak = limits["bf16_matmul_TFLOP_s"] * 1e12
    keep(prefill=prefill(engine, SHAPES[name], sizes, peak))
    keep(scoring=scoring(engine, SHAPES[name], sizes, peak))
    engine.close()
    return found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun


def questions(engine: Engine, count: int, rows: int, tokens: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            str(n),
            engine.model.question(n),
            tuple(RowRequest(row_seed(0, str(n), j), max_new_tokens=tokens) for j in range(rows)),
        )
        for n in range(count)
    ]


@dataclass
class ReplayClock:
    """How long captured steps take on the device, from their first kernel to their last."""

    spans: list[tuple[Any, Any]] = field(default_factory=list)
    num_steps: int = 0

    def watch(self, engine: Engine) -> None:
        for captured in engine.decoder.graphs.graphs.values():
            captured.replay = self.timing(partial(type(captured).replay, captured))

    def timing(self, replay: Callable[[int], None]) -> Callable[[int], None]:
        def timed(num_steps: int) -> None:
            if torch.cuda.is_available():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay(num_steps)
                end.record()
                self.spans.append((start, end))
            else:
                self.spans.append((0.0, seconds(lambda: replay(num_steps))))
            self.num_steps += num_steps

        return timed

    @property
    def ms_per_step(self) -> float:
        on_device = torch.cuda.is_available()
        spent = (s.elapsed_time(e) if on_device else 1e3 * (e - s) for s, e in self.spans)
        return sum(spent) / max(1, self.num_steps)


def decode(engine: Engine, rows: int, sizes: Sizes, bandwidth: float) -> dict[str, Any]:
    """A step of `rows` rows: its time, its floor, and what of it passes between captured steps."""
    asked = [questions(engine, rows // sizes.k, sizes.k, tokens) for tokens in sizes.steps]
    list(engine.generate(asked[1]))  # captures, warms up
    is_captured = engine.decoder.graphs is not None
    clock, spent, steps = ReplayClock(), [], []
    if is_captured:
        clock.watch(engine)
    for requests in asked:
        engine.counters.clear()
        spent.append(seconds(lambda requests=requests: list(engine.generate(requests))))
        steps.append(engine.counters["decode_steps"])
    ms = 1e3 * (spent[1] - spent[0]) / (steps[1] - steps[0])
    prompt, own = len(engine.model.question(0)), sum(sizes.steps) / 2
    cached = engine.planner.bytes_per_token * (rows // sizes.k * prompt + rows * own)
    read = language_bytes(engine) + cached
    floor_ms = 1e3 * read / bandwidth
    return {
        "ms_per_step": round(ms, 3),
        "ms_on_device": round(clock.ms_per_step, 3) if is_captured else None,
        "ms_between_steps": round(ms - clock.ms_per_step, 3) if is_captured else None,
        "floor_ms": round(floor_ms, 3),
        "over_floor": round(ms / floor_ms, 3),
        "tokens_per_second": round(1e3 * rows / ms, 1),
        "rows_at_once": round(engine.counters["decode_tokens"] / steps[1], 1),
    }


def language_bytes(engine: Engine) -> int:
    """Bytes of weights that each step reads: all layers and the head, not the table of tokens."""
    model = engine.model
    skipped = {
        id(p)
        for m in model.backbone.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters()
    }
    parts = [*model.backbone.parameters(), model.lm_head.weight]
    return sum(p.numel() * p.itemsize for p in parts if id(p) not in skipped)


def flops_of(engine: Engine, shape: Shape, lengths: list[tuple[int, int]], heads: int) -> float:
    """Operations of the language model on (new tokens, tokens seen before), and of head rows."""
    per_token = 2 * (
        language_bytes(engine) // engine.model.dtype.itemsize - shape.vocab * shape.hidden
    )
    products = sum(new * per_token for new, _ in lengths)
    pairs = sum(new * before + new * (new + 1) / 2 for new, before in lengths)
    return (
        products + 4 * shape.layers * shape.hidden * pairs + 2 * shape.vocab * shape.hidden * heads
    )


def prefill(engine: Engine, shape: Shape, sizes: Sizes, peak: float) -> dict[str, Any]:
    """Whole prompts, pictures included, and their language part alone."""
    runner = engine.runner
    prompts = [engine.model.question(n) for n in range(sizes.prefilled)]
    starts = [runner.cache.allocate_span(len(prompt)) for prompt in prompts]
    with torch.no_grad():
        runner.prefill(prompts, starts)
        spent = min(seconds(lambda: runner.prefill(prompts, starts)) for _ in range(3))
        pictures = min(seconds(lambda: engine.model.encode_images(prompts)) for _ in range(3))
    for prompt, start in zip(prompts, starts):
        runner.cache.release_span(start, len(prompt))
    tokens = sum(map(len, prompts))
    flops = flops_of(engine, shape, [(len(prompt), 0) for prompt in prompts], 0)
    return {
        "tokens_per_second": round(tokens / spent, 1),
        "language_tokens_per_second": round(tokens / (spent - pictures), 1),
        "share_of_matmul_limit": round(flops / (spent - pictures) / peak, 3),
        "seconds": round(spent, 4),
        "seconds_of_pictures": round(pictures, 4),
    }


def scoring(engine: Engine, shape: Shape, sizes: Sizes, peak: float) -> dict[str, Any]:
    """Given answers' log-probs, prefill of their prompts included."""
    generator = torch.Generator().manual_seed(0)
    size = (sizes.scored, sizes.k, sizes.tokens)
    ids = torch.randint(3, shape.vocab - 1, size, generator=generator).tolist()
    requests = [
        ScoreRequest(str(n), engine.model.question(n), tuple(map(tuple, answers)))
        for n, answers in enumerate(ids)
    ]
    list(engine.score(requests))
    spent = min(seconds(lambda: list(engine.score(requests))) for _ in range(2))
    prompt = len(requests[0].prompt)
    lengths = [(prompt, 0)] * sizes.scored + [(sizes.tokens, prompt)] * sizes.scored * sizes.k
    heads = sizes.scored * sizes.k * sizes.tokens
    return {
        "tokens_per_second": round(sum(new for new, _ in lengths) / spent, 1),
        "share_of_matmul_limit": round(flops_of(engine, shape, lengths, heads) / spent / peak, 3),
        "seconds": round(spent, 4),
    }
