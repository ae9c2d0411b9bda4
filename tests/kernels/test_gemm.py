import pytest
import torch
from stream_kernels import gemm
from stream_kernels.cpu import panel_product
from stream_kernels.cpu.tile_product import takes
from torch.nn import functional


@pytest.mark.parametrize("num_rows", [1, 7, 64, 130])
@pytest.mark.parametrize("size", [1, 33, 256])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_linear_is_no_worse_than_torch_against_float64(
    num_rows: int, size: int, packed: bool
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(num_rows, size), torch.randn(97, size), torch.randn(97)
    truth = functional.linear(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        got = gemm.linear(x, gemm.pack(weight) if packed else weight, bias)
        naive = functional.linear(x, weight, bias)
    # The two add in another order; a product in a shorter format would be off by 1e-3 of `size`.
    assert (got - truth).abs().max() <= (naive - truth).abs().max() + 3e-7 * size + 1e-6


@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_packed_bfloat16_is_no_worse_than_torch_against_float64(num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 256).bfloat16(), torch.randn(97, 256).bfloat16()
    truth = functional.linear(x.double(), weight.double())
    with torch.no_grad():
        got = gemm.linear(x, gemm.pack(weight))
        naive = functional.linear(x, weight)
    assert got.dtype == torch.bfloat16
    assert (got - truth).abs().max() <= 1.01 * (naive - truth).abs().max() + 1e-6


def test_linear_takes_batches_strides_and_no_rows() -> None:
    x, weight = torch.randn(3, 5, 16)[:, ::2], torch.randn(9, 32)[:, ::2]
    with torch.no_grad():
        assert torch.allclose(gemm.linear(x, weight), functional.linear(x, weight), atol=1e-5)
        assert gemm.linear(x[:0], weight).shape == (0, 3, 9)


def test_linear_trains_through_torch() -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    gemm.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x.sum(dim=0).expand(3, 8), atol=1e-5)


def test_without_onednn_linear_is_torch_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "onednn_pays", lambda dtype=torch.float32: False)
    x, weight = torch.randn(40, 64), torch.randn(50, 64)
    with torch.no_grad():
        assert gemm.pack(weight) is weight
        assert torch.equal(gemm.linear(x, weight), functional.linear(x, weight))


def test_a_missing_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    for dtype in (torch.float32, torch.bfloat16):
        assert gemm.onednn_pays.__wrapped__(dtype) is False


@pytest.mark.parametrize("num_rows", [1, 16, 40])
def test_a_product_in_tiles_is_as_exact_as_a_float32_one(num_rows: int) -> None:
    """And each row's is the same whatever rows stand beside it."""
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 256).bfloat16(), torch.randn(501, 256).bfloat16()
    if not takes(weight):
        pytest.skip("this processor has no AMX, or there is no compiler")
    bias = torch.randn(501).bfloat16()
    truth = functional.linear(x.double(), weight.double(), bias.double())
    got = gemm.linear_float32(x, weight, bias)
    assert got.dtype == torch.float32
    assert (got - truth).abs().max() <= 2**-21 * truth.abs().max()
    assert torch.equal(gemm.linear_float32(x[-1:], weight, bias)[0], got[-1])
    assert gemm.pack_for_float32(weight) is weight


@pytest.mark.parametrize("num_rows", [1, 17, 64, 65, 700])
@pytest.mark.parametrize("size", [32, 2048])
def test_a_product_in_tiles_rounds_once(num_rows: int, size: int) -> None:
    """Whatever blocks of rows and columns it is made in, and however many threads make it."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, num_rows, size).bfloat16(), torch.randn(301, size).bfloat16()
    if not takes(weight):
        pytest.skip("this processor has no AMX, or there is no compiler")
    bias = torch.randn(301).bfloat16()
    truth = functional.linear(x.float(), weight.float(), bias.float())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            got = gemm.linear(x, gemm.pack(weight), bias)
    finally:
        torch.set_num_threads(threads)
    assert got.dtype == torch.bfloat16
    assert ((got - truth).abs() <= 2**-8 * truth.abs() + 1e-4 * size**0.5).all()
    with torch.no_grad():
        assert torch.equal(gemm.linear(x[1, -1:], weight, bias)[0], got[1, -1])


@pytest.mark.parametrize("num_rows", [1, 5, 6, 50, 400])
@pytest.mark.parametrize("size", [16, 768, 4112, 8242])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_weights_in_panels_are_exact(
    num_rows: int, size: int, dtype: torch.dtype
) -> None:
    """In any blocks, by any threads, several in one call; and a row's are the same by itself."""
    torch.manual_seed(0)
    x = torch.randn(2, num_rows, size).to(dtype)
    weights = [torch.randn(num_columns, size).to(dtype) for num_columns in (64, 97, 300)]
    biases = [torch.randn(64).to(dtype), None, torch.randn(300).to(dtype)]
    packed = [gemm.pack(weight) for weight in weights]
    if not all(map(panel_product.reads, packed)):
        pytest.skip("needs AVX-512 (with BF16 for bfloat16), oneDNN and a C compiler")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            got = gemm.linears(x, packed, biases)
    finally:
        torch.set_num_threads(threads)
    for out, weight, bias in zip(got, weights, biases, strict=True):
        exact_bias = None if bias is None else bias.double()
        truth = functional.linear(x.double(), weight.double(), exact_bias)
        assert out.dtype == dtype
        rounding = 0 if dtype == torch.float32 else 2**-8 * truth.abs()  # half a unit
        assert ((out - truth).abs() <= rounding + 2**-20 * truth.abs().max()).all()
    with torch.no_grad():
        alone = gemm.linear(x[1, -1:], packed[2], biases[2])
    assert torch.equal(alone[0], got[2][1, -1])


@pytest.mark.parametrize("num_rows", [1, 40])
def test_the_head_in_panels_of_bfloat16_is_as_exact_as_a_float32_one(num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 256).bfloat16(), torch.randn(501, 256).bfloat16()
    bias = torch.randn(501).bfloat16()
    packed = gemm.pack_for_float32(weight)
    if not (packed.dtype == torch.bfloat16 and panel_product.reads(packed)):
        pytest.skip("needs AVX512_BF16 without AMX, oneDNN and a C compiler")
    truth = functional.linear(x.double(), weight.double(), bias.double())
    got = gemm.linear_float32(x, packed, bias)
    assert got.dtype == torch.float32
    assert (got - truth).abs().max() <= 2**-21 * truth.abs().max()


def test_a_layout_of_another_kind_is_left_to_onednn() -> None:
    for dtype, atol in ((torch.float32, 1e-4), (torch.bfloat16, 0.25)):
        weight = torch.randn(128, 77).to(dtype)  # no multiple of what is taken at a time
        packed = gemm.pack(weight)
        if not packed.is_mkldnn:
            pytest.skip("oneDNN is not this processor's choice")
        assert not panel_product.reads(packed)
        shuffled, other = torch.randn(2, 128, 64).to(dtype)
        assert not panel_product._is_in_panels(shuffled, gemm.pack(other))
        with torch.no_grad():
            x = torch.randn(3, 77).to(dtype)
            assert torch.allclose(gemm.linear(x, packed), functional.linear(x, weight), atol=atol)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_two_bfloat16_products_are_as_exact_as_a_float32_one(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone is off by up to 2**-9 of a logit, which is where the log-probs would be lost."""
    if not (torch.cpu._is_amx_tile_supported() and gemm.onednn_pays(torch.bfloat16)):
        pytest.skip("this processor has no AMX: one float32 product is used")
    assert gemm.two_products_pay()
    torch.manual_seed(0)
    x, weight = torch.randn(40, 256).bfloat16(), torch.randn(500, 256).bfloat16()
    bias = torch.randn(500).bfloat16()
    truth = functional.linear(x.double(), weight.double(), bias.double())
    monkeypatch.setattr(gemm, "takes", lambda weight: False)
    with torch.no_grad():
        got = gemm.linear_float32(x, gemm.pack(weight) if packed else weight, bias)
    assert got.dtype == torch.float32
    assert (got - truth).abs().max() <= 2**-17 * truth.abs().max()
    assert (got.bfloat16() - truth).abs().max() > 2**-10 * truth.abs().max()


def test_without_amx_one_float32_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert gemm.two_products_pay.__wrapped__() is False
