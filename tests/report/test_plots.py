"""The geometry of the plots: every count is in a bar, and the axes say round values."""

from __future__ import annotations

from collections import Counter

import pytest

from stream_engine.report.plots import HEIGHT, WIDTH, Series, counted, histogram, nice_values


def test_every_count_is_in_a_bar_inside_the_drawing() -> None:
    counter = Counter({3: 10, 4: 5, 90: 1, 5000: 1})
    plot = counted("Words", "words", [("chosen", counter, "chosen")])
    assert sum(int(bar.title.split(": ")[1].split()[0]) for bar in plot.bars) == 17
    for bar in plot.bars:
        assert bar.x >= 0 and bar.x + bar.width <= WIDTH
        assert bar.y >= 0 and bar.y + bar.height <= HEIGHT


def test_a_few_far_values_share_the_last_bin() -> None:
    counter = Counter({1: 500, 2: 500, 100_000: 1})
    plot = counted("Words", "words", [("all", counter, "all")])
    assert [bar.title for bar in plot.bars] == [
        "1: 500 pairs",
        "2: 500 pairs",
        "3 and more: 1 pairs",
    ]


def test_bars_are_as_high_as_their_counts() -> None:
    plot = histogram("M", "m", [0.0, 0.5, 1.0], [Series("m", [10, 5], "all")])
    assert plot.bars[0].height == pytest.approx(2 * plot.bars[1].height, abs=0.02)
    assert plot.summary == "M. 15 pairs, most of them, 10, between 0 and 0.5."


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_nothing_is_no_error(counts: list[int]) -> None:
    edges = [float(i) for i in range(len(counts) + 1)]
    assert histogram("M", "m", edges, [Series("m", counts, "all")]).bars == []
    assert counted("M", "m", [("m", Counter({3: 0}), "all")]).bars == []


@pytest.mark.parametrize(
    ("least", "greatest", "values"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-1.2, 0.3, [-1, -0.5, 0]), (5, 5, [5])],
)
def test_ticks_are_round(least: float, greatest: float, values: list[float]) -> None:
    assert nice_values(least, greatest, 5) == pytest.approx(values)
