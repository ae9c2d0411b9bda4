"""The way of samples and pairs through a run as one picture: what went in, what came out, and what
was lost on the way, by reason. At each step in = out + lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from stream_engine.report.run import ReportedRun
from stream_engine.report.survey import NO_CANDIDATE, Survey

WIDTH = 1000
NODE = 12  # wide
THICK = 92  # of a band's first node
GAP = 276  # between nodes
LINE = 17  # of text
MAX_REASONS = 6
WIDEST_BRANCH = 60


@dataclass(frozen=True)
class Loss:
    """What was lost at a step, by reason."""

    reason: str
    count: int
    link: str = ""
    """Fate by which the pairs page shows some of them; "" where it has none."""


@dataclass
class Step:
    """A count on the way, and what is lost before the next one."""

    name: str
    count: int
    losses: list[Loss] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return sum(loss.count for loss in self.losses)


@dataclass
class Band:
    """Steps in one unit, drawn from left to right."""

    unit: str
    steps: list[Step]

    @property
    def adds_up(self) -> bool:
        """Whether nothing vanished: at each step in = out + lost."""
        return all(a.count == b.count + a.lost for a, b in zip(self.steps, self.steps[1:]))


def bands_of(run: ReportedRun, found: Survey, set_aside: Mapping[str, Counter[str]]) -> list[Band]:
    """The two bands of a run. `set_aside` is by stage, then by reason; "input" among them."""
    samples = run.inputs.samples
    inputs = run.inputs.manifest.inputs.values()
    known = sum(info.known for info in inputs)
    rejected: Counter[str] = Counter()
    for info in inputs:
        rejected.update(info.rejected)
    read = samples["total"] + known + sum(rejected.values())
    at_reading = [Loss(loss.reason, loss.count, f"input: {loss.link}") for loss in losses(rejected)]
    if known:
        at_reading.append(Loss("read before", known))
    at_work = [
        Loss(f"{stage}: {loss.reason}", loss.count, f"{stage}: {loss.link}")
        for stage in ("rollouts", "rewards")
        for loss in losses(set_aside[stage])
    ]
    if samples["missing"]:
        at_work.append(Loss("in shards without results", samples["missing"]))
    without = [
        Loss(NO_CANDIDATE[loss.link], loss.count, loss.link) for loss in losses(found.no_candidate)
    ]
    without += [
        Loss(f"all pairs dropped: {words(reason)}", count, reason)
        for reason, count in found.all_dropped.most_common()
    ]
    questions = Band(
        "questions",
        [
            Step("records read", read, at_reading),
            Step("questions", samples["total"], at_work),
            Step("scored", found.num_samples, without),
            Step("with a pair", found.num_samples - found.pairs_per_question[0]),
        ],
    )
    pairs = Band(
        "pairs",
        [
            Step("candidates", found.num_candidates, losses(found.dropped)),
            Step("kept", found.num_kept),
        ],
    )
    written = run.stats.get("pairs", {}).get("written")
    if run.is_merged and written is not None:
        refused = Counter(run.stats["pairs"]["dropped"]) - found.dropped
        pairs.steps[-1].losses = [Loss(loss.reason, loss.count) for loss in losses(refused)]
        pairs.steps.append(Step(f"written ({run.config.format[0]})", written))
    return [questions, pairs]


def losses(counts: Mapping[str, int]) -> list[Loss]:
    """Most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Loss(words(reason), count, reason) for reason, count in ordered if count]


def words(reason: str) -> str:
    """A reason as a person says it."""
    return reason.replace("_", " ")


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    kind: str = ""
    link: str = ""


@dataclass(frozen=True)
class Shape:
    """A filled outline (`d` as in SVG paths) with a title."""

    d: str
    kind: str
    title: str


@dataclass
class Drawing:
    """The flow as shapes and labels."""

    width: int = WIDTH
    height: float = 0.0
    shapes: list[Shape] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    summary: str = ""


def draw(bands: list[Band]) -> Drawing:
    """Lay the bands out, one below the other."""
    drawing = Drawing()
    top = 46.0
    for band in bands:
        top = draw_band(drawing, band, top) + 62
    drawing.height = top - 62 + 8
    drawing.summary = " ".join(in_words(band) for band in bands)
    return drawing


def draw_band(drawing: Drawing, band: Band, top: float) -> float:
    """Draw one band from its upper edge; returns its lower edge."""
    scale = THICK / max(1, band.steps[0].count)
    lowest = top + THICK
    for number, step in enumerate(band.steps):
        x = 10 + number * (GAP + NODE)
        height = max(1.5, step.count * scale)
        drawing.shapes.append(
            Shape(box(x, top, NODE, height), "node", f"{step.count:,} {step.name}")
        )
        drawing.labels.append(Label(x, top - 22, step.name, "name"))
        drawing.labels.append(Label(x, top - 6, f"{step.count:,}", "count"))
        if number == len(band.steps) - 1:
            break
        after = band.steps[number + 1].count * scale
        start, end = x + NODE, x + NODE + GAP
        if after > 0:
            title = f"{band.steps[number + 1].count:,} go on"
            drawing.shapes.append(Shape(box(start, top, end - start, after), "stream", title))
        if step.losses:
            lowest = max(lowest, draw_losses(drawing, step, start, top + after, scale))
    return lowest


def draw_losses(drawing: Drawing, step: Step, x: float, y: float, scale: float) -> float:
    """The branch that leaves a band downwards, and its reasons; returns its lower edge."""
    thick = max(1.5, step.lost * scale)
    width = min(thick, WIDEST_BRANCH)
    foot = x + 18 + width
    below = y + thick + 20
    drawing.shapes.append(
        Shape(
            f"M{x} {y:.1f} C{foot} {y:.1f} {foot} {y + thick / 2:.1f} {foot} {below:.1f} "
            f"H{foot - width:.1f} C{foot - width:.1f} {y + thick + 6:.1f} {x + 8} "
            f"{y + thick:.1f} {x} {y + thick:.1f} Z",
            "loss",
            f"{step.lost:,} lost after {step.name}",
        )
    )
    named = step.losses[:MAX_REASONS]
    rest = step.losses[MAX_REASONS:]
    line = below + 14
    for loss in named:
        text = f"−{loss.count:,} {loss.reason}"
        drawing.labels.append(Label(x + 4, line, clipped(text), "reason", link=loss.link))
        line += LINE
    if rest:
        text = f"−{sum(loss.count for loss in rest):,} for {len(rest)} other reasons"
        drawing.labels.append(Label(x + 4, line, text, "reason"))
        line += LINE
    return line - LINE + 6


def box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f} h{width:.1f} v{height:.2f} h{-width:.1f} Z"


def clipped(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def in_words(band: Band) -> str:
    """A band as a sentence for each step."""
    said = []
    for step, after in zip(band.steps, band.steps[1:]):
        lost = ", ".join(f"{loss.count:,} {loss.reason}" for loss in step.losses)
        tail = f" + {step.lost:,} lost ({lost})" if lost else ""
        said.append(f"{step.count:,} {step.name} = {after.count:,} {after.name}{tail}.")
    return " ".join(said)
