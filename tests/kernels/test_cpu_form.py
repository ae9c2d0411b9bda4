"""The compiled form for CPU: head sizes and formats, what changes no bit, and how it is built."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_kernels import linear_logp, prefix_attention, reference, sample
from stream_kernels.cpu import (
    compiled,
    decode_attention,
    extend_attention,
    layer_steps,
    log_sums,
    panel_product,
    sampling,
    tile_product,
)
from stream_kernels.cpu.decode_attention import serves

from tests.kernels.cases import PrefixCase, prefix_case, prefix_truth

needs_library = pytest.mark.skipif(
    compiled.library() is None, reason="needs AVX-512 and a C compiler"
)
HEADS = [(4, 4), (6, 2), (71, 1)]


def case_of(heads: tuple[int, int], size: int, dtype: torch.dtype) -> PrefixCase:
    case = prefix_case(
        group_sizes=[3, 0, 10],
        prefix_lengths=[63, 9, 130],
        suffix_lengths=[1, 64, 65, 3, 16, 17, 8, 2, 63, 5, 6, 7, 80],
        heads=heads[0],
        kv_heads=heads[1],
        size=size,
        dtype=dtype,
    )
    assert serves(case.query, (case.prefix_key,) * 2, (case.suffix_key,) * 2)
    return case


@needs_library
@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("size", [2, 36, 64, 80, 96, 128, 256])
def test_any_head_size_matches_float64(heads: tuple[int, int], size: int) -> None:
    scale = size**-0.5
    case = case_of(heads, size, torch.float32)
    assert (prefix_attention(*case, scale=scale) - prefix_truth(case, scale)).abs().max() < 3e-6
    case = case_of(heads, size, torch.bfloat16)
    exact = prefix_truth(case, scale)
    naive = (reference.prefix_attention(*case, scale=scale) - exact).abs().max()
    assert (prefix_attention(*case, scale=scale) - exact).abs().max() <= naive + 1e-4


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whatever_rows_and_threads_there_are(dtype: torch.dtype) -> None:
    case = case_of((6, 2), 64, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out = prefix_attention(*case, scale=0.125)
        torch.set_num_threads(3)
        assert torch.equal(prefix_attention(*case, scale=0.125), out)
    finally:
        torch.set_num_threads(threads)
    for row in case.group_rows[2].tolist():
        alone = case._replace(
            query=case.query[row : row + 1],
            prefix_spans=case.prefix_spans[2:],
            group_rows=torch.zeros(1, 1, dtype=torch.int32),
            row_slots=case.row_slots[row : row + 1],
            suffix_lengths=case.suffix_lengths[row : row + 1],
        )
        assert torch.equal(prefix_attention(*alone, scale=0.125)[0], out[row])


@needs_library
def test_a_row_that_is_not_a_number_stays_so_and_alone() -> None:
    """What the engine knows a broken row by."""
    case = case_of((4, 4), 64, torch.bfloat16)
    clean = prefix_attention(*case, scale=0.125)
    case.query[5, 2, 7] = torch.nan
    out = prefix_attention(*case, scale=0.125)
    assert out[5, 2].isnan().all()
    out[5, 2] = clean[5, 2]
    assert torch.equal(out, clean)


def test_other_layouts_are_left_to_torch() -> None:
    case = prefix_case(group_sizes=[2], prefix_lengths=[5], suffix_lengths=[1, 2], size=15)
    assert not serves(case.query, (case.prefix_key,) * 2, (case.suffix_key,) * 2)
    out = prefix_attention(*case, scale=0.25)
    assert (out - prefix_truth(case, 0.25)).abs().max() < 2e-6


@needs_library
@pytest.mark.parametrize(
    ("module", "look_up"),
    [
        pytest.param(decode_attention, lambda m: m._function.__wrapped__(), id="attention"),
        pytest.param(extend_attention, lambda m: m._function.__wrapped__(), id="extend"),
        pytest.param(tile_product, lambda m: m._function.__wrapped__(), id="product"),
        pytest.param(panel_product, lambda m: m._function.__wrapped__(torch.float32), id="panels"),
        pytest.param(panel_product, lambda m: m._function.__wrapped__(torch.bfloat16), id="pairs"),
        pytest.param(sampling, lambda m: m._function.__wrapped__(), id="sampling"),
        pytest.param(log_sums, lambda m: m._function.__wrapped__("sums_of_logits"), id="logits"),
        pytest.param(log_sums, lambda m: m._function.__wrapped__("sums_of_products"), id="sums"),
        pytest.param(layer_steps, lambda m: m._functions.__wrapped__(), id="layer"),
    ],
)
def test_a_function_that_is_wrong_here_is_not_used(
    module: Any,
    look_up: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that says it has done its work and has not."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    names = ("decode_attention", "tile_product", "draw_tokens", *layer_steps.NAMES)
    names += ("sums_of_logits", "sums_of_products", "extend_attention", "panel_products")
    idle = {name: kind(lambda arguments, parallel: 1) for name in names}
    told = {"tiles_run_here": 1, "bfloat16_runs_here": 1, "rows_of_a_chunk": 64}
    library = SimpleNamespace(**{name: partial(int, is_so) for name, is_so in told.items()}, **idle)
    monkeypatch.setattr(compiled, "library", lambda: library)
    assert not look_up(module)
    assert "is wrong on this machine" in caplog.text


ANSWERS = """
import sys, torch
from stream_kernels import linear_logp, prefix_attention, sample
from stream_kernels.cpu import compiled
assert compiled.library() is None
attention, head, drawn = torch.load(sys.argv[1], weights_only=True)
tokens, logps = sample(*drawn, temperature=0.7)
answers = prefix_attention(*attention, scale=0.125), linear_logp(*head), tokens, logps
torch.save(answers, sys.argv[2])
"""


@needs_library
def test_the_form_torch_gives_the_same_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = tuple(case_of((6, 2), 64, torch.float32))
    head = torch.randn(40, 64).bfloat16(), torch.randn(3000, 64).bfloat16(), torch.arange(40) * 70
    drawn = torch.randn(16, 3000) * 3, torch.rand(16, dtype=torch.float64)
    given, taken = tmp_path / "given.pt", tmp_path / "taken.pt"
    torch.save((attention, head, drawn), given)
    environment = {**os.environ, "STREAM_KERNELS_FORM": "torch"}
    command = [sys.executable, "-c", ANSWERS, str(given), str(taken)]
    subprocess.run(command, env=environment, check=True)
    out, logps, tokens, token_logps = torch.load(taken, weights_only=True)
    assert (prefix_attention(*attention, scale=0.125) - out).abs().max() < 3e-6
    assert (linear_logp(*head) - logps).abs().max() < 1e-5
    own_tokens, own_logps = sample(*drawn, temperature=0.7)
    assert own_tokens.tolist() == tokens.tolist()
    assert (own_logps - token_logps).abs().max() < 1e-5


def test_processes_that_start_together_build_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    counting = tmp_path / "bin/cc"
    counting.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec gcc "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    source, target = tmp_path / "one.c", tmp_path / "kept/one.so"
    source.write_text("int one(void) { return 1; }")
    workers = [
        threading.Thread(target=compiled._build, args=([str(source)], target)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert target.exists()
    assert (tmp_path / "calls").read_text() == "\n"


def test_without_a_compiler_torch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(compiled.UnavailableError, match="no C compiler"):
        compiled.built()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert compiled.library.__wrapped__() is None


def test_a_processor_without_avx512_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert compiled.library.__wrapped__() is None
