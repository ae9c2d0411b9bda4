"""Counts as drawings: the geometry of histograms and bars, which the templates write as SVG.

Drawn here rather than by a plotting library: those style each mark with inline styles, which the
page's Content-Security-Policy refuses, or need scripts of a megabyte. As classes of the page the
marks follow its light and dark colours, and each bar can carry its numbers in words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 36  # around the plot's field
MAX_BINS = 40
WIDEST = 48  # bar of one whole number
TAIL = 0.995
"""Share of the counted values that have bins of their own width; the rest shares the last bin."""


@dataclass(frozen=True)
class Bar:
    """One bar, in the drawing's units, and what it says."""

    x: float
    y: float
    width: float
    height: float
    title: str
    kind: str = ""


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """Counts in bins that all series of a plot share. `kind` is the class that colours it."""

    name: str
    counts: Sequence[int]
    kind: str


@dataclass
class Plot:
    """A drawing of bars over a horizontal axis."""

    title: str
    x_label: str
    y_label: str
    summary: str
    """The plot in words, for who does not see it."""
    series: list[Series]
    bars: list[Bar] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    zero: float | None = None
    """Where a line marks 0."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def histogram(
    title: str,
    x_label: str,
    edges: Sequence[float],
    series: Sequence[Series],
    *,
    unit: str = "pairs",
    last_is_open: bool = False,
    is_whole: bool = False,
) -> Plot:
    """Bars of counts between edges, several series over one another.

    `is_whole`: each bin is of one whole number, the one at its lower edge.
    """
    num_all = max((sum(one.counts) for one in series), default=0)
    plot = Plot(title, x_label, unit, summary_of(title, edges, series, unit), list(series))
    if not num_all or len(edges) < 2:
        plot.summary = f"{title}: nothing to show."
        return plot
    span = (edges[-1] - edges[0]) or 1.0
    most = max(max(one.counts) for one in series)
    scale_x = (plot.right - plot.left) / span
    scale_y = (plot.bottom - plot.top) / most
    for one in series:
        for number, count in enumerate(one.counts):
            if not count:
                continue
            begin, end = edges[number], edges[number + 1]
            is_open = last_is_open and number == len(one.counts) - 1
            between = short(begin) if is_whole else f"{short(begin)} to {short(end)}"
            between = f"{short(begin)} and more" if is_open else between
            name = f"{one.name}, " if len(series) > 1 else ""
            room = (end - begin) * scale_x
            wide = min(max(0.5, room - 0.6), WIDEST if is_whole else room)
            plot.bars.append(
                Bar(
                    x=round(plot.left + (begin - edges[0]) * scale_x + (room - wide) / 2, 2),
                    y=round(plot.bottom - count * scale_y, 2),
                    width=round(wide, 2),
                    height=round(count * scale_y, 2),
                    title=f"{name}{between}: {count:,} {unit}",
                    kind=one.kind,
                )
            )
    middle = 0.5 if is_whole else 0.0
    plot.x_ticks = [
        Tick(round(plot.left + (value + middle - edges[0]) * scale_x, 2), short(value))
        for value in nice_values(edges[0], edges[-1] - 2 * middle, 6)
        if not is_whole or value == int(value)
    ]
    plot.y_ticks = [
        Tick(round(plot.bottom - value * scale_y, 2), compact(value))
        for value in nice_values(0, most, 4)
        if value == int(value)
    ]
    if edges[0] < 0 < edges[-1]:
        plot.zero = round(plot.left + (middle - edges[0]) * scale_x, 2)
    return plot


def counted(
    title: str,
    x_label: str,
    counters: Sequence[tuple[str, Counter[int], str]],
    *,
    unit: str = "pairs",
    first: int | None = None,
) -> Plot:
    """A histogram of whole numbers, each series as (name, value -> how many, kind).

    The axis begins at `first`, or at the least value.
    """
    values: Counter[int] = Counter()
    for _, counter, _ in counters:
        values.update(+counter)
    if not values:
        return histogram(title, x_label, [], [], unit=unit)
    least, most = min(values) if first is None else first, max(values)
    cap = quantile(values, TAIL)
    is_capped = most > cap + max(5, cap - least)
    top = cap if is_capped else most
    step = max(1, math.ceil((top + 1 - least) / MAX_BINS))
    num_bins = math.ceil((top + 1 - least) / step) + is_capped
    edges = [least + step * number for number in range(num_bins + 1)]
    series = []
    for name, counter, kind in counters:
        counts = [0] * num_bins
        for value, count in (+counter).items():
            counts[min((value - least) // step, num_bins - 1)] += count
        series.append(Series(name, counts, kind))
    return histogram(
        title, x_label, edges, series, unit=unit, last_is_open=is_capped, is_whole=step == 1
    )


def quantile(counts: Counter[int], share: float) -> int:
    """The least value that at least `share` of the counted ones do not exceed."""
    needed, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return max(counts)


def summary_of(title: str, edges: Sequence[float], series: Sequence[Series], unit: str) -> str:
    """A histogram in words."""
    parts = []
    for one in series:
        if not sum(one.counts):
            continue
        top = max(range(len(one.counts)), key=lambda number: one.counts[number])
        name = f"{one.name}: " if len(series) > 1 else ""
        parts.append(
            f"{name}{sum(one.counts):,} {unit}, most of them, {one.counts[top]:,}, between "
            f"{short(edges[top])} and {short(edges[top + 1])}"
        )
    return f"{title}. {'; '.join(parts)}."


def nice_values(least: float, greatest: float, about: int) -> list[float]:
    """Round values between two bounds, about so many."""
    span = greatest - least
    if span <= 0:
        return [least]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(least / step)
    return [number * step for number in range(first, math.floor(greatest / step) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def compact(value: float) -> str:
    """A count in few characters: 1.2M, 45k, 300."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:g}"
