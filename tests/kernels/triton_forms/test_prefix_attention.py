from typing import Any

import pytest
import torch
from stream_kernels import reference
from stream_kernels.gpu import prefix_attention
from stream_kernels.gpu.prefix_batch import PrefixBatch
from stream_kernels.gpu.prefix_fused import attend_fused
from stream_kernels.gpu.prefix_split import attend_split, prefix_options

from tests.kernels.cases import PrefixCase, prefix_case, prefix_truth
from tests.kernels.triton_forms.device import DEVICE, DTYPES, OUTPUT_ERROR

# Tiles hold 64 tokens: lengths of 1, a tile less 1, a tile, a tile and 1, several; empty groups.
UNEQUAL: dict[str, Any] = {
    "group_sizes": [3, 0, 1, 5],
    "prefix_lengths": [63, 9, 0, 130],
    "suffix_lengths": [1, 64, 65, 3, 20, 7, 8, 2, 63],
}
CASES = [
    pytest.param(UNEQUAL, id="unequal"),
    pytest.param(
        {"group_sizes": [16], "prefix_lengths": [64], "suffix_lengths": list(range(1, 17))},
        id="sixteen-rows",
    ),
    pytest.param(
        {"group_sizes": [1, 1], "prefix_lengths": [65, 1], "suffix_lengths": [1, 128]}, id="alone"
    ),
]
FORMS = pytest.mark.parametrize("form", [attend_fused, attend_split], ids=["fused", "split"])
HEADS = pytest.mark.parametrize(
    "heads", [(2, 2, 16), (6, 2, 40), (7, 1, 64)], ids=["mha", "gqa", "mqa"]
)


def run(form: Any, case: PrefixCase) -> torch.Tensor:
    return form(PrefixBatch(*(tensor.to(DEVICE) for tensor in case)), 0.25).cpu()


@pytest.mark.parametrize("shape", CASES)
@HEADS
@FORMS
def test_rows_match_float64(form: Any, heads: Any, shape: Any) -> None:
    case = prefix_case(**shape, heads=heads[0], kv_heads=heads[1], size=heads[2])
    error = (run(form, case) - prefix_truth(case, 0.25)).abs().max()
    assert error <= OUTPUT_ERROR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@FORMS
def test_half_precision_is_no_worse_than_the_naive_form(form: Any, dtype: torch.dtype) -> None:
    case = prefix_case(**UNEQUAL, heads=6, kv_heads=2, size=40, dtype=dtype)
    exact = prefix_truth(case, 0.25)
    naive_error = (reference.prefix_attention(*case, scale=0.25) - exact).abs().max()
    out = run(form, case)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= naive_error + OUTPUT_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_with_more_rows_than_a_tile_take_several(dtype: torch.dtype) -> None:
    case = prefix_case(
        group_sizes=[19, 2],
        prefix_lengths=[70, 5],
        suffix_lengths=[5] * 21,
        heads=7,
        kv_heads=1,
        dtype=dtype,
    )
    assert prefix_options(7, 16, 1, 19, dtype.itemsize)["ROW_TILES"] > 1
    error = (run(attend_split, case) - prefix_truth(case, 0.25)).abs().max()
    assert error <= 2 * OUTPUT_ERROR[dtype]


@FORMS
def test_the_order_of_groups_and_repetition_change_no_bit(form: Any) -> None:
    case = prefix_case(**UNEQUAL)
    order = [2, 3, 1, 0]
    moved = case._replace(prefix_spans=case.prefix_spans[order], group_rows=case.group_rows[order])
    out = run(form, case)
    assert torch.equal(out, run(form, case))
    assert torch.equal(out, run(form, moved))


@FORMS
def test_nan_outside_the_spans_and_suffixes_is_not_seen(form: Any) -> None:
    case = prefix_case(**UNEQUAL)
    out = run(form, case)
    outside = torch.ones(case.prefix_key.shape[1], dtype=torch.bool)
    for start, length in case.prefix_spans.tolist():
        outside[start : start + length] = False
    used = torch.zeros(case.suffix_key.shape[0], dtype=torch.int64)
    used[case.row_slots.long()] = case.suffix_lengths.long()
    stale = torch.arange(case.suffix_key.shape[2]) >= used[:, None]
    for prefix, suffix in [
        (case.prefix_key, case.suffix_key),
        (case.prefix_value, case.suffix_value),
    ]:
        prefix[:, outside] = torch.nan
        suffix.masked_fill_(stale[:, None, :, None], torch.nan)
    assert torch.equal(out, run(form, case))


def test_scores_of_hundreds_do_not_overflow() -> None:
    case = prefix_case(**UNEQUAL)
    case = case._replace(query=case.query * 200)
    for form in (attend_fused, attend_split):
        assert (run(form, case) - prefix_truth(case, 0.25)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("groups", "heads", "fused"), [(32, (32, 32), True), (2, (32, 32), False), (32, (28, 4), False)]
)
def test_many_groups_without_shared_heads_take_one_launch(
    groups: int, heads: tuple[int, int], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_attention, "num_processors", lambda device: 132)
    monkeypatch.setattr(prefix_attention, "attend_fused", lambda *arguments: "fused")
    monkeypatch.setattr(prefix_attention, "attend_split", lambda *arguments: "split")
    case = prefix_case(
        group_sizes=[10] * groups,
        prefix_lengths=[1] * groups,
        suffix_lengths=[1] * 10 * groups,
        heads=heads[0],
        kv_heads=heads[1],
    )
    assert prefix_attention.prefix_attention_cuda(*case, scale=1.0) == (
        "fused" if fused else "split"
    )
