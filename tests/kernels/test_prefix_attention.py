import sys
from typing import Any

import pytest
import torch
from stream_kernels import HostLayout, prefix_attention, reference
from stream_kernels.cpu import compiled

from tests.kernels.cases import PrefixCase, Recorder, prefix_case, prefix_truth

UNEQUAL: dict[str, Any] = {
    "group_sizes": [3, 0, 1, 16, 5],
    "prefix_lengths": [63, 9, 0, 65, 1],
    "suffix_lengths": [1, 64, 65, 3, 200, 7, 8, 2, 63, *range(1, 17)],
}
HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)], ids=["mha", "gqa", "mqa"])


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def compiled_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for the compiled form and, without it, for torch's."""
    if request.param == "torch":
        module = sys.modules["stream_kernels.prefix_attention"]
        monkeypatch.setattr(module, "serves", lambda *arguments: False)
    elif compiled.library() is None:
        pytest.skip("needs AVX-512 and a C compiler")


def host_of(case: PrefixCase) -> HostLayout:
    return HostLayout.from_tensors(
        case.prefix_spans, case.group_rows, case.row_slots, case.suffix_lengths
    )


@HEADS
@pytest.mark.parametrize(
    "form", [prefix_attention, reference.prefix_attention], ids=["fast", "ref"]
)
def test_unequal_groups_match_float64_row_by_row(heads: tuple[int, int], form: Any) -> None:
    case = prefix_case(**UNEQUAL, heads=heads[0], kv_heads=heads[1])
    assert (form(*case, scale=0.25) - prefix_truth(case, 0.25)).abs().max() < 2e-6


@HEADS
def test_bfloat16_is_no_worse_than_the_naive_form(heads: tuple[int, int]) -> None:
    case = prefix_case(**UNEQUAL, heads=heads[0], kv_heads=heads[1], dtype=torch.bfloat16)
    exact = prefix_truth(case, 0.25)
    naive = reference.prefix_attention(*case, scale=0.25)
    out = prefix_attention(*case, scale=0.25)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= (naive - exact).abs().max() + 1e-2


def test_large_scores_do_not_overflow() -> None:
    case = prefix_case(**UNEQUAL)
    case = case._replace(query=case.query * 50)
    assert (prefix_attention(*case, scale=1.0) - prefix_truth(case, 1.0)).abs().max() < 1e-3


def test_the_hosts_copy_changes_nothing_and_spares_every_read() -> None:
    case = prefix_case(**UNEQUAL, heads=6, kv_heads=2)
    host = host_of(case)
    with Recorder() as recorder:
        out = prefix_attention(*case, scale=0.25, host=host)
    assert torch.equal(out, prefix_attention(*case, scale=0.25))
    assert not any("local_scalar" in name for name in recorder.operators)


def test_neither_slab_is_copied() -> None:
    case = prefix_case(
        group_sizes=[10, 10], prefix_lengths=[300, 400], suffix_lengths=[150] * 20, kv_heads=2
    )
    host = host_of(case)
    assert host.suffix_runs
    with Recorder() as recorder:
        prefix_attention(*case, scale=0.25, host=host)
    slab_bytes = min(case.prefix_key.numel(), case.suffix_key.numel()) * 4
    assert recorder.largest_bytes < slab_bytes / 2


def test_order_of_groups_and_repetition_change_no_bit() -> None:
    case = prefix_case(**UNEQUAL)
    out = prefix_attention(*case, scale=0.25)
    order = [4, 2, 0, 1, 3]
    moved = case._replace(prefix_spans=case.prefix_spans[order], group_rows=case.group_rows[order])
    assert torch.equal(out, prefix_attention(*case, scale=0.25))
    assert torch.equal(out, prefix_attention(*moved, scale=0.25))


def test_what_lies_beyond_a_suffix_is_not_seen() -> None:
    case = prefix_case(**UNEQUAL)
    out = prefix_attention(*case, scale=0.25)
    used = torch.zeros(case.suffix_key.shape[0], dtype=torch.int64)
    used[case.row_slots.long()] = case.suffix_lengths.long()
    stale = torch.arange(case.suffix_key.shape[2]) >= used[:, None]  # [S, C]
    for slab in (case.suffix_key, case.suffix_value):
        slab.masked_fill_(stale[:, None, :, None], 1e4)
    assert torch.equal(out, prefix_attention(*case, scale=0.25))


@pytest.mark.parametrize(
    "form", [prefix_attention, reference.prefix_attention], ids=["fast", "ref"]
)
def test_new_keys_and_values_are_written_before_they_are_read(form: Any) -> None:
    case = prefix_case(**UNEQUAL, heads=6, kv_heads=2)
    expected = prefix_attention(*case, scale=0.25)
    slots, last = case.row_slots.long(), case.suffix_lengths.long() - 1
    slabs = [case.suffix_key.clone(), case.suffix_value.clone()]
    new = [slab[slots, :, last].transpose(0, 1).contiguous().transpose(0, 1) for slab in slabs]
    for slab in slabs:
        slab[slots, :, last] = 7.0
    given = case._replace(suffix_key=slabs[0], suffix_value=slabs[1])
    out = form(*given, scale=0.25, new=tuple(new))
    assert (out - expected).abs().max() < 1e-6
    assert torch.equal(slabs[0], case.suffix_key)
    assert torch.equal(slabs[1], case.suffix_value)


def test_no_rows_give_no_output() -> None:
    case = prefix_case(group_sizes=[1], prefix_lengths=[4], suffix_lengths=[1])
    empty = case._replace(
        query=case.query[:0],
        group_rows=torch.full((1, 1), -1, dtype=torch.int32),
        row_slots=case.row_slots[:0],
        suffix_lengths=case.suffix_lengths[:0],
    )
    assert prefix_attention(*empty, scale=0.25).shape == (0, 4, 16)
