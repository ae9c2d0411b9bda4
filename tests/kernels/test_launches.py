"""What the wrappers hand to Triton, without a GPU: grids, the device, kernels that fit the chip."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_kernels.gpu import (
    attention,
    block_stats,
    choose,
    linear_logp,
    prefix_attention,
    prefix_fused,
    prefix_split,
    top_k_top_p,
)
from stream_kernels.gpu.attention import attention_with_lse_cuda
from stream_kernels.gpu.linear_logp import linear_logp_fused
from stream_kernels.gpu.prefix_batch import PrefixBatch
from stream_kernels.gpu.sample import sample_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import prefix_case
from tests.kernels.sm90 import compiled_launches

LARGEST_AXES = (2**31 - 1, 65535, 65535)
SHARED_BYTES = 227 << 10
LAUNCHERS = (attention, block_stats, choose, linear_logp, prefix_fused, prefix_split, top_k_top_p)


def attend(batch: int, device: str) -> None:
    """One short answer a row, as scoring gives them."""
    query = torch.empty(batch, 32, 2, 128, device=device)
    key = torch.empty(batch, 8, 2, 128, device=device)
    attention_with_lse_cuda(query, key, key, scale=1.0, causal=True, key_lengths=None)


def decode(*, is_fused: bool) -> Callable[[int, str], None]:
    def run(rows: int, device: str) -> None:
        def int32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        query = torch.empty(rows, 4, 16, device=device)
        prefix = torch.empty(2, 64, 16, device=device)
        slots = torch.empty(rows, 2, 1, 16, device=device)
        groups = (int32(rows, 2), int32(rows, 1))
        keys = (prefix, prefix, *groups, slots, slots, int32(rows), int32(rows))
        count = 0 if is_fused else 10**9
        with pytest.MonkeyPatch.context() as patch:
            for module in (prefix_attention, prefix_split):
                patch.setattr(module, "num_processors", lambda device: count)
            prefix_attention.prefix_attention_cuda(query, *keys, scale=1.0)

    return run


def draw(rows: int, device: str) -> None:
    logits = torch.empty(rows, 2048, device=device)
    points = torch.empty(rows, dtype=torch.float64, device=device)
    suppress = torch.zeros(1, dtype=torch.int64, device=device)
    options: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    sample_cuda(logits, points, suppress=suppress, penalized=None, **options)


def score(rows: int, device: str) -> None:
    hidden = torch.empty(rows, 64, dtype=torch.float16, device=device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    linear_logp_fused(hidden, hidden, targets, splits=2)


WRAPPERS = pytest.mark.parametrize(
    "launch",
    [
        pytest.param(attend, id="attention"),
        pytest.param(decode(is_fused=True), id="fused-prefix"),
        pytest.param(decode(is_fused=False), id="split-prefix"),
        pytest.param(draw, id="sample"),
        pytest.param(score, id="linear-logp"),
    ],
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Every launch's grid, and the device that was current."""
    seen: list[SimpleNamespace] = []
    current: list[str] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: seen.append(
                SimpleNamespace(grid=grid, device=current[-1] if current else None)
            )

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(str(tensor.device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in LAUNCHERS:
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder())
    return seen


@WRAPPERS
def test_no_batch_exceeds_a_grid(launch: Any, launches: list[SimpleNamespace]) -> None:
    """Thousands of short answers times their key heads were more than the second axis holds."""
    launch(70_000, "meta")
    assert launches
    for one in launches:
        assert all(size <= most for size, most in zip(one.grid, LARGEST_AXES)), one.grid


@WRAPPERS
def test_kernels_are_launched_on_the_tensors_device(
    launch: Any, launches: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went to the device that was current, where the tensors' addresses mean nothing."""
    monkeypatch.setattr(linear_logp, "num_processors", lambda device: 132)
    with FakeTensorMode():
        launch(3, "cuda:1")
    assert launches and {one.device for one in launches} == {"cuda:1"}


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(128, torch.float32, id="128-float32"),
        pytest.param(256, torch.float32, id="256-float32"),
        pytest.param(80, torch.float16, id="80-float16"),
        pytest.param(128, torch.bfloat16, id="128-bfloat16"),
        pytest.param(256, torch.bfloat16, id="256-bfloat16"),
    ],
)
def test_attention_fits_the_chip(size: int, dtype: torch.dtype) -> None:
    """Float32 took 224 of 227 KB at heads of 128, and more at larger ones."""
    with compiled_launches() as launched:
        for queries in (1, 200):
            query = torch.zeros(2, 8, queries, size, dtype=dtype)
            key = torch.zeros(2, 4, 9, size, dtype=dtype)
            attention_with_lse_cuda(query, key, key, scale=1.0, causal=False, key_lengths=None)
        for heads, kv_heads, rows in ((4, 4, 10), (28, 4, 10), (4, 4, 1)):
            case = prefix_case(
                group_sizes=[rows],
                prefix_lengths=[9],
                suffix_lengths=[2] * rows,
                heads=heads,
                kv_heads=kv_heads,
                size=size,
                dtype=dtype,
            )
            if rows * heads // kv_heads <= prefix_attention._FUSED_ROWS:
                prefix_fused.attend_fused(PrefixBatch(*case), 1.0)
            prefix_split.attend_split(PrefixBatch(*case), 1.0)
    assert {name for name, _ in launched} == {
        "attention_kernel",
        "fused_kernel",
        "prefix_kernel",
        "suffix_kernel",
    }
    assert max(shared for _, shared in launched) <= SHARED_BYTES


def test_one_kernel_serves_all_lengths() -> None:
    """Each was compiled anew for lengths of 1, for multiples of 16 and for others."""
    kernels = (attention.attention_kernel, prefix_fused.fused_kernel, prefix_split.prefix_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()
    with compiled_launches():
        for queries, keys in ((1, 1), (2, 16), (5, 9), (16, 630), (16, 640)):
            query = torch.zeros(1, 1, queries, 64, dtype=torch.bfloat16)
            key = torch.zeros(1, 1, keys, 64, dtype=torch.bfloat16)
            attention_with_lse_cuda(query, key, key, scale=1.0, causal=False, key_lengths=None)
        for rows in (12, 16):
            case = prefix_case(
                group_sizes=[rows],
                prefix_lengths=[9],
                suffix_lengths=[2] * rows,
                size=64,
                dtype=torch.bfloat16,
            )
            prefix_fused.attend_fused(PrefixBatch(*case), 1.0)
            prefix_split.attend_split(PrefixBatch(*case), 1.0)
    for kernel in kernels:
        [(compiled, *_)] = kernel.device_caches.values()
        assert len(compiled) == 1, kernel.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_and_log_probs_fit_the_chip(dtype: torch.dtype) -> None:
    module = importlib.import_module("tests.kernels.triton_forms.test_linear_logp")
    with compiled_launches() as launched:
        for columns in (500, 152_064):
            logits, points = torch.zeros(2, columns, dtype=dtype), torch.rand(2).double()
            for filters in ({"top_k": 0, "top_p": 1.0}, {"top_k": 5, "top_p": 0.9}):
                sample_cuda(
                    logits, points, temperature=0.7, suppress=None, penalized=None, **filters
                )
        hidden, targets = torch.zeros(33, 64, dtype=dtype), torch.zeros(33, dtype=torch.int64)
        linear_logp_fused(hidden, hidden, targets, **module.SMALL_TILES)
    assert len({name for name, _ in launched}) == 4
    assert max(shared for _, shared in launched) <= SHARED_BYTES
