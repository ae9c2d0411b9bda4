import random

import torch
from stream_kernels import HostLayout


def layout(slots: list[int], lengths: list[int]) -> HostLayout:
    return HostLayout([], [], slots, lengths)


def test_runs_cover_each_slot_in_use_once_and_mask_what_is_beyond() -> None:
    draw = random.Random(0)
    slots = draw.sample(range(60), 40)
    lengths = [draw.randint(1, 400) for _ in slots]
    covered = {}
    for run in layout(slots, lengths).suffix_runs:
        for place, slot in enumerate(range(run.first, run.last)):
            assert slot not in covered
            visible = torch.ones(run.length) if run.mask is None else run.mask[place, 0, 0] == 0
            covered[slot] = int(visible.sum())
            assert visible[: covered[slot]].all()
    assert covered == dict(zip(slots, lengths, strict=True))


def test_equal_neighbours_share_one_run_without_a_mask() -> None:
    (run,) = layout([2, 0, 1], [75, 75, 75]).suffix_runs
    assert (run.first, run.last, run.length, run.mask) == (0, 3, 75, None)


def test_a_slot_far_longer_than_its_neighbours_gets_a_run_of_its_own() -> None:
    runs = layout(list(range(20)), [20] * 19 + [900]).suffix_runs
    assert [(run.first, run.last, run.length) for run in runs] == [(0, 19, 20), (19, 20, 900)]


def test_a_layout_says_what_the_tensors_say() -> None:
    got = HostLayout.from_tensors(
        torch.tensor([[3, 7], [10, 0]], dtype=torch.int32),
        torch.tensor([[2, 0, -1], [1, -1, -1]], dtype=torch.int32),
        torch.tensor([5, 0, 9], dtype=torch.int32),
        torch.tensor([1, 2, 3], dtype=torch.int32),
    )
    assert got == HostLayout([(3, 7), (10, 0)], [[2, 0], [1]], [5, 0, 9], [1, 2, 3])


def test_rows_go_to_an_order_and_come_back() -> None:
    rows = torch.arange(4) * 10
    for order in (layout([7, 2, 9, 4], [1] * 4).by_slot, layout([0, 1, 2, 3], [1] * 4).by_slot):
        assert order.give_back(order.take(rows)).tolist() == rows.tolist()
    assert layout([7, 2, 9, 4], [1] * 4).by_slot.take(rows).tolist() == [10, 30, 0, 20]
    grouped = HostLayout([(0, 1), (0, 1), (1, 1)], [[2, 0], [], [1]], [0, 1, 2], [1] * 3)
    assert grouped.by_group.take(rows[:3]).tolist() == [20, 0, 10]
