"""The GPU path: captured decode steps draw what eager ones draw, and what the CPU draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from stream_kernels.gpu import prefix_attention

from stream_engine.config import ModelConfig
from stream_engine.engine import Engine, GenerateRequest, Generation, ResolvedSampling, ScoreRequest
from stream_engine.models import load_model
from tests.engine.conftest import ask, full_forward_logps
from tests.gpu.device import DEVICE, ON_GPU, needs_device, needs_gpu, torch_forms
from tests.models import writers_llava as writers

pytestmark = needs_device

QUESTIONS, ROWS, TOKENS = (6, 4, 20) if ON_GPU else (2, 2, 3)
"""A rehearsal in the interpreter takes a second for each step."""
Drawn = dict[tuple[str, int], tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Case:
    """Settings of an engine, and what it is asked."""

    sampling: dict[str, Any]
    max_rows: int = 64
    questions: int = QUESTIONS
    rows: int = ROWS
    stops: frozenset[int] = frozenset()


CASES = {
    "plain": Case({}),
    "one-row": Case({}, max_rows=1, questions=QUESTIONS // 2, rows=1),
    "refilled": Case({}, max_rows=QUESTIONS - 1),
    "stops": Case({}, stops=frozenset(range(0, 480, 9))),  # rows finish at different steps
    "penalty": Case({"repetition_penalty": 1.3}, max_rows=6),
    "top-k": Case({"top_k": 20}),
    "top-k-p": Case({"top_k": 50, "top_p": 0.8}),
    "greedy": Case({"temperature": 0.0}),
    "hundreds": Case({}, max_rows=320, questions=24, rows=16),
}


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Engine]]:
    """Make an engine of a checkpoint, on a device; keywords are sampling values."""
    made: list[Engine] = []

    def make(folder, device=DEVICE, *, dtype="float32", max_rows=64, **values) -> Engine:
        defaults = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": TOKENS,
        }
        model = load_model(folder, ModelConfig(device=device, dtype=dtype))
        made.append(Engine(model, ResolvedSampling(**(defaults | values)), max_rows=max_rows))
        return made[-1]

    yield make
    for engine in made:
        if hasattr(engine, "model"):
            engine.close()


@pytest.fixture
def engine_on(engine_of, checkpoint):
    return partial(engine_of, checkpoint)


def eager(engine: Engine) -> Engine:
    engine.decoder.graphs = None
    return engine


def drawn(results: Iterator[Any]) -> Drawn:
    """Tokens and their log-probs, by question and row."""
    results = list(results)
    assert all(isinstance(result, Generation) for result in results), results
    return {
        (result.key, place): (row.token_ids, row.token_logps)
        for result in results
        for place, row in enumerate(result.rows)
    }


def assert_same(one: Drawn, other: Drawn) -> None:
    """The same tokens, and log-probs within rounding.

    Sums in another order move the cumulative probabilities by 1e-7, and of thousands of tokens one
    lies that near to the next: of ten rows and more, one in a hundred may part from the other. Its
    log-probs agree until then.
    """
    assert one.keys() == other.keys()
    parted = 0
    for key, (ids, logps) in one.items():
        other_ids, other_logps = other[key]
        alike = [a == b for a, b in zip(ids, other_ids)]
        common = alike.index(False) if False in alike else len(alike)
        assert logps[:common] == pytest.approx(other_logps[:common], abs=1e-4)
        parted += ids != other_ids
    assert parted <= (0 if len(one) < 10 else max(1, len(one) // 100))


def was_captured(engine: Engine) -> bool:
    graphs = engine.decoder.graphs
    return graphs is not None and bool(graphs.graphs)


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """The rows of each decode step that Triton's attention was asked for."""
    rows: list[int] = []
    attend = prefix_attention.prefix_attention_cuda

    def noting(query, *arguments, **options):
        rows.append(len(query))
        return attend(query, *arguments, **options)

    monkeypatch.setattr(prefix_attention, "prefix_attention_cuda", noting)
    return rows


@pytest.mark.parametrize("name", CASES)
def test_captured_steps_draw_what_eager_ones_and_the_cpu_draw(engine_on, attended, name):
    """The steps once took their attention from the compiled layers of the CPU in a rehearsal."""
    if name == "hundreds" and not ON_GPU:
        pytest.skip("hundreds of rows take the interpreter minutes")
    case = CASES[name]

    def run(engine: Engine) -> Drawn:
        engine.runner.stop_token_ids |= case.stops
        return drawn(engine.generate(ask(engine, case.questions, rows=case.rows)))

    captured = engine_on(max_rows=case.max_rows, **case.sampling)
    got = run(captured)
    assert was_captured(captured), "decode steps could not be captured"
    assert attended
    assert_same(got, run(eager(engine_on(max_rows=case.max_rows, **case.sampling))))
    with torch_forms():
        assert_same(got, run(engine_on("cpu", max_rows=case.max_rows, **case.sampling)))
    assert len(got) == case.questions * case.rows
    lengths = {len(ids) for ids, _ in got.values()}
    assert lengths == {TOKENS} or (case.stops and len(lengths) > 1)


HEADS = {"mha": (4, 4), "gqa": (6, 2)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_log_probs_are_as_exact_as_a_full_forward_of_that_dtype(
    engine_of, tmp_path, heads, size, dtype
):
    """Judged by the same weights in float32 on CPU; `naive` is the plain forward on the device."""
    if not ON_GPU and (heads, size, dtype) != ("gqa", 80, "float16"):
        pytest.skip("one of these is enough for a rehearsal")
    query_heads, kv_heads = HEADS[heads]
    shape = writers.Shape(hidden=query_heads * size, heads=query_heads, kv_heads=kv_heads)
    writers.write_original(tmp_path / "llava", writers.random_weights(shape, seed=3))
    engine = engine_of(tmp_path / "llava", dtype=dtype)
    prompts = {request.key: request.prompt for request in ask(engine, QUESTIONS)}
    results = drawn(engine.generate(ask(engine, QUESTIONS)))
    assert was_captured(engine)
    with torch_forms():
        exact_engine = engine_of(tmp_path / "llava", "cpu")
        exact_prompts = {request.key: request.prompt for request in ask(exact_engine, QUESTIONS)}
    error = naive_error = 0.0
    for (key, _), (ids, logps) in list(results.items())[:: 1 if ON_GPU else 2]:
        exact = torch.tensor(full_forward_logps(exact_engine, exact_prompts[key], ids))
        naive = torch.tensor(full_forward_logps(engine, prompts[key], ids))
        naive_error = max(naive_error, (naive - exact).abs().max().item())
        error = max(error, (torch.tensor(logps) - exact).abs().max().item())
    assert error <= 1.5 * naive_error + {"float32": 1e-4, "float16": 5e-3}.get(dtype, 3e-2)


def test_cpu_and_gpu_score_alike(engine_on):
    gpu = engine_on()
    with torch_forms():
        cpu = engine_on("cpu")
    answers = ((5, 9, 200, 31), (7, 7), (450,))
    result = next(gpu.score([ScoreRequest("k", ask(gpu, 1)[0].prompt, answers)]))
    for answer, logps in zip(answers, result.token_logps):
        expected = full_forward_logps(cpu, ask(cpu, 1)[0].prompt, list(answer))
        assert logps == pytest.approx(expected, abs=1e-3)


def test_steps_are_captured_again_when_the_cache_grows(engine_on):
    """Rows with prompts of their own, longer than what a slot was planned to hold."""
    own = tuple(range(5, 45))

    def long(engine: Engine) -> list[GenerateRequest]:
        return [
            replace(request, rows=tuple(replace(row, suffix_ids=own) for row in request.rows))
            for request in ask(engine, QUESTIONS, rows=2)
        ]

    captured, plain = engine_on(), eager(engine_on())
    for _ in range(2 if ON_GPU else 1):
        for requests in (lambda engine: ask(engine, QUESTIONS // 2), long):
            assert_same(
                drawn(captured.generate(requests(captured))),
                drawn(plain.generate(requests(plain))),
            )
    assert was_captured(captured)


def test_graphs_of_two_engines_take_turns(engine_on):
    """Each keeps its own stream and pool: dropping one's graphs leaves the other's whole."""
    one, other, plain = engine_on(), engine_on(), eager(engine_on())
    count = QUESTIONS - 1
    expected = drawn(plain.generate(ask(plain, count)))
    for _ in range(3 if ON_GPU else 1):
        assert_same(drawn(one.generate(ask(one, count))), expected)
        assert_same(drawn(other.generate(ask(other, count))), expected)
        one.runner.free_memory()  # its graphs are captured anew, into a new pool
    one.close()
    assert_same(drawn(other.generate(ask(other, count))), expected)
    assert was_captured(other)


def test_what_is_begun_early_in_captured_steps_is_drawn_the_same(engine_on):
    def make(engine: Engine) -> tuple[Engine, list[GenerateRequest], list[GenerateRequest]]:
        engine.runner.stop_token_ids |= set(range(100, 160))
        requests = ask(engine, QUESTIONS)
        return engine, requests[: QUESTIONS // 2], requests[QUESTIONS // 2 :]

    plain, first, second = make(engine_on(max_rows=8))
    expected = [drawn(plain.generate(part)) for part in (first, second)]
    engine, first, second = make(engine_on(max_rows=8))
    got = [drawn(engine.generate(first, ahead=second))]
    begun = len(engine.scheduler.early)
    got.append(drawn(engine.generate(second)))
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)
    assert begun > 0 or not ON_GPU
    assert was_captured(engine)


@needs_gpu
def test_a_step_that_cannot_be_captured_runs_eagerly_and_leaves_the_device_whole(engine_on):
    """A read in the middle of a step ends its capture: random numbers could not be drawn after it,
    nor steps of another engine be captured."""
    refused, other, plain = engine_on(), engine_on(), eager(engine_on())
    expected = drawn(plain.generate(ask(plain, QUESTIONS)))
    logits = refused.runner.logits
    refused.runner.logits = lambda hidden: (hidden.sum().item(), logits(hidden))[1]
    assert_same(drawn(refused.generate(ask(refused, QUESTIONS))), expected)
    assert refused.decoder.graphs is None
    assert torch.rand(3, device=DEVICE).max() < 1
    assert_same(drawn(other.generate(ask(other, QUESTIONS))), expected)
    assert was_captured(other)


@needs_gpu
def test_a_device_named_by_its_number_is_the_same(engine_on):
    named = engine_on("cuda:0")
    assert named.model.device == torch.device("cuda:0")
    assert_same(drawn(named.generate(ask(named, 3))), drawn((e := engine_on()).generate(ask(e, 3))))


@needs_gpu
def test_memory_that_is_really_out_halves_the_batch_and_loses_nothing(engine_on):
    """All that is free is taken before a prefill; half a GiB comes back when that is told."""
    roomy, pressed = engine_on(), engine_on()
    expected = drawn(roomy.generate(ask(roomy, 12)))
    list(pressed.generate(ask(pressed, 1)))  # plans its memory, and tries the plan
    ballast: list[torch.Tensor] = []
    free_memory, halve = pressed.runner.free_memory, pressed.runner.budget.halve
    halved: list[float] = []

    def take(module, args, kwargs) -> None:
        hook.remove()
        ballast.append(torch.empty(1 << 29, dtype=torch.uint8, device=DEVICE))
        torch.cuda.empty_cache()
        for num_bytes in (1 << 30, 1 << 26, 1 << 21, 1 << 18, 1 << 12, 1 << 9):
            while True:
                try:
                    ballast.append(torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE))
                except torch.OutOfMemoryError:
                    break

    def give_some_back() -> None:
        del ballast[:1]
        free_memory()

    def count_halving() -> None:
        halve()
        halved.append(pressed.runner.budget.scale)

    pressed.runner.free_memory = give_some_back
    pressed.runner.budget.halve = count_halving
    hook = pressed.model.backbone.register_forward_pre_hook(take, with_kwargs=True)
    try:
        assert_same(drawn(pressed.generate(ask(pressed, 12))), expected)
        assert ballast, "no forward came to take the memory"
        assert halved and halved[0] == 0.5
    finally:
        ballast.clear()
        torch.cuda.empty_cache()
