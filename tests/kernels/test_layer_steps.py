"""What is fused of a decoder layer, against the torch lines that it stands for."""

import pytest
import torch
from stream_kernels.cpu import layer_steps
from torch import Tensor
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(
    not layer_steps.serves(torch.float32), reason="needs AVX-512 and a C compiler"
)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosines[:, None] + torch.cat((-high, low), dim=-1) * sines[:, None]


def assert_rounded_alike(got: Tensor, truth: Tensor) -> None:
    """Equal up to the last bits: of bfloat16 one, of float32 what some operations may differ by."""
    assert got.dtype == truth.dtype and got.shape == truth.shape
    units = 4 if truth.dtype == torch.float32 else 1
    assert ((got - truth).abs() <= truth.abs() * units * torch.finfo(truth.dtype).eps + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 2, 768)], ids=str)
def test_rms_norm_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    raised = x.float()
    scaled = raised * torch.rsqrt(raised.pow(2).mean(-1, keepdim=True) + 1e-3)
    assert_rounded_alike(layer_steps.rms_norm(x, weight, 1e-3), weight * scaled.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 64, 80])
def test_rotary_is_torchs_bit_for_bit(size: int, dtype: torch.dtype) -> None:
    query, packed = normal(5, 6, size, dtype=dtype), normal(5, 3, size, dtype=dtype)
    key = packed[:, :2]  # rows further apart than their heads take
    tables = normal(5, size, dtype=dtype), normal(6, size, dtype=dtype)[1:]
    truths, kept = [turned(each, *tables) for each in (query, key)], packed[:, 2].clone()
    layer_steps.rotary(query, key, *tables)
    assert torch.equal(query, truths[0]) and torch.equal(key, truths[1])
    assert torch.equal(packed[:, 2], kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_multiply_is_torchs(dtype: torch.dtype) -> None:
    gate, up = normal(7, 45, dtype=dtype) * 9, normal(7, 45, dtype=dtype)
    gate[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    assert_rounded_alike(layer_steps.silu_and_multiply(gate, up), functional.silu(gate) * up)


def test_rows_are_shared_out_among_threads_and_stay_the_same() -> None:
    x, weight = normal(300, 512, dtype=torch.float32), normal(512, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer_steps.rms_norm(x, weight, 1e-6)
        torch.set_num_threads(3)
        assert torch.equal(layer_steps.rms_norm(x, weight, 1e-6), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(layer_steps.rms_norm(x[70:71], weight, 1e-6)[0], alone[70])
