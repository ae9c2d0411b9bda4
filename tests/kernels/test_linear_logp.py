import sys
from typing import Any

import pytest
import torch
from stream_kernels import gemm, linear_logp, reference
from stream_kernels.cpu import panel_product
from stream_kernels.cpu.log_sums import takes_products

from tests.kernels.cases import Recorder


def inputs(num_tokens: int, size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    torch.manual_seed(num_tokens + size + vocab_size)
    hidden = torch.randn(num_tokens, size).to(dtype)
    weight = (torch.randn(vocab_size, size) * 3 / size**0.5).to(dtype)
    return hidden, weight, torch.randint(vocab_size, (num_tokens,))


def truth(hidden: Any, weight: Any, targets: Any, bias: Any = None, **options: Any) -> Any:
    """log_softmax in float64 of the same rounded inputs."""
    logits = hidden.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    logits = logits[:, : options.get("vocab_size")] * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return torch.log_softmax(logits, dim=1)[range(len(targets)), targets]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 1), (1, 33, 255), (7, 40, 256), (64, 31, 257), (65, 64, 20_000), (2049, 8, 300)],
    ids=str,
)
def test_logps_are_as_exact_as_the_full_computation(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    hidden, weight, targets = inputs(*shape, dtype=dtype)
    exact = truth(hidden, weight, targets)
    got, naive = (form(hidden, weight, targets) for form in (linear_logp, reference.linear_logp))
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= (naive - exact).abs().max() + 2e-6


def test_bfloat16_weights_lose_nothing_that_their_rounding_did_not() -> None:
    """A bfloat16 product has errors of 1e-2; the weights are raised to float32 first."""
    hidden, weight, targets = inputs(33, 512, 3000, torch.bfloat16)
    error = (linear_logp(hidden, weight, targets) - truth(hidden, weight, targets)).abs().max()
    naive = torch.log_softmax((hidden @ weight.T).float(), dim=1)[range(33), targets]
    assert error < 1e-5 < (naive - truth(hidden, weight, targets)).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [None, 2990])
def test_a_packed_weight_gives_what_the_plain_one_does(
    dtype: torch.dtype, vocab_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = inputs(700, 64, 3001, dtype)
    bias, packed = torch.randn(3001).to(dtype), gemm.pack_for_float32(weight)
    if not panel_product.reads(packed):
        pytest.skip("needs AVX-512, oneDNN and a C compiler, and no AMX for bfloat16")
    given = hidden, weight, targets % 2990
    plain = linear_logp(*given, bias=bias, vocab_size=vocab_size)
    read: list[int] = []
    some = panel_product.some_columns
    monkeypatch.setattr(
        panel_product,
        "some_columns",
        lambda *which: read.append(which[3] - which[2]) or some(*which),
    )
    got = linear_logp(*given, bias=bias, vocab_size=vocab_size, packed=packed)
    assert sum(read) == (vocab_size or 3001)
    assert (got - plain).abs().max() < 3e-6
    other = gemm.pack_for_float32(weight.float()) if dtype == torch.bfloat16 else packed
    assert (linear_logp(*given, packed=other) - linear_logp(*given)).abs().max() < 3e-6


def test_in_tiles_a_token_is_the_same_whatever_tokens_and_threads_there_are() -> None:
    hidden, weight, targets = inputs(70, 64, 3001, torch.bfloat16)
    if not takes_products(hidden, weight):
        pytest.skip("this processor has no AMX, or there is no compiler")
    logps = linear_logp(hidden, weight, targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_logp(hidden, weight, targets), logps)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(linear_logp(hidden[5:6], weight, targets[5:6])[0], logps[5])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"vocab_size": 900}, id="padded-vocabulary"),
        pytest.param({"logit_scale": 0.0625}, id="scale"),
        pytest.param({"softcap": 3.0}, id="softcap"),
        pytest.param({"logit_scale": 5.0, "softcap": 3.0, "vocab_size": 901}, id="all"),
    ],
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_options_change_the_logits_in_the_contracts_order(options: Any, biased: bool) -> None:
    hidden, weight, targets = inputs(9, 24, 1000, torch.float32)
    targets = targets % 900
    bias = torch.randn(1000) if biased else None
    exact = truth(hidden, weight, targets, bias, **options)
    for form in (linear_logp, reference.linear_logp):
        got = form(hidden, weight, targets, bias=bias, **options)
        assert (got - exact).abs().max() < 2e-5


def test_huge_logits_and_impossible_tokens_stay_numbers() -> None:
    hidden, weight, targets = inputs(17, 16, 700, torch.float32)
    bias = torch.zeros(700)
    bias[::2] = -torch.inf
    targets = targets | 1
    exact = truth(hidden * 500, weight, targets, bias)
    got = linear_logp(hidden * 500, weight, targets, bias=bias)
    assert ((got - exact).abs() <= 1e-6 * exact.abs() + 2e-5).all()


def test_the_logits_that_matter_most_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the long product at the target and at the peak leaves no trace."""
    hidden, weight, targets = inputs(9, 64, 20_001, torch.float32)
    exact = truth(hidden, weight, targets)
    peaks = (hidden @ weight.T).argmax(dim=1)
    targets[0], exact[0] = peaks[0], truth(hidden, weight, peaks)[0]  # one is both
    moved: set[int] = {*targets.tolist(), *peaks.tolist()}
    columns = 0

    def wrong_there(x: Any, chunk: Any, bias: Any = None) -> Any:
        nonlocal columns
        logits = x @ chunk.T
        for row in range(len(x)):
            for column in {int(targets[row]), int(peaks[row])}:
                if columns <= column < columns + len(chunk):
                    logits[row, column - columns] += 0.01
                    moved.discard(column)
        columns += len(chunk)
        return logits

    monkeypatch.setattr(sys.modules[linear_logp.__module__], "linear", wrong_there)
    got = linear_logp(hidden, weight, targets)
    assert columns == 20_001 and not moved
    assert (got - exact).abs().max() < 5e-6


def test_a_stretch_of_impossible_tokens_counts_for_nothing() -> None:
    """Whole chunks of the vocabulary at -inf, the first and a later one."""
    hidden, weight, targets = inputs(2048, 8, 3000, torch.float32)
    bias = torch.zeros(3000)
    bias[:600] = bias[1500:2500] = -torch.inf
    targets = targets % 800 + 650
    exact = truth(hidden, weight, targets, bias)
    got = linear_logp(hidden, weight, targets, bias=bias)
    assert (got - exact).abs().max() < 5e-6


def test_a_target_outside_the_vocabulary_is_nan() -> None:
    hidden, weight, _ = inputs(3, 8, 50, torch.float32)
    got = linear_logp(hidden, weight, torch.tensor([-1, 5, 40]), vocab_size=40)
    assert torch.isnan(got).tolist() == [True, False, True]


def test_the_logits_are_never_made() -> None:
    hidden, weight, targets = inputs(512, 16, 40_000, torch.bfloat16)
    with Recorder() as recorder:
        linear_logp(hidden, weight, targets)
    assert recorder.largest_bytes <= 4 << 20 < 512 * 40_000 * 4


def test_no_tokens_strides_and_repeats() -> None:
    hidden, weight, targets = inputs(40, 32, 3000, torch.float32)
    assert linear_logp(hidden[:0], weight, targets[:0]).shape == (0,)
    once = linear_logp(hidden, weight, targets)
    assert torch.equal(once, linear_logp(hidden, weight, targets))
    strided = linear_logp(hidden.T.contiguous().T, weight, targets)
    assert torch.allclose(once, strided, atol=1e-5)
