"""What the first page of a report says: counts, distributions, time, and what deserves a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stream_engine.config import STAGES, ModelConfig, RankingConfig, SamplingConfig
from stream_engine.pairs.statistics import Histogram
from stream_engine.records import Failure
from stream_engine.report.flow import Drawing, bands_of, draw
from stream_engine.report.plots import Plot, Series, counted, histogram, short
from stream_engine.report.run import ReportedRun
from stream_engine.report.survey import Survey
from stream_engine.run_dir.results import ResultHeader, read_header, read_quarantine
from stream_engine.run_dir.timings import timing_from
from stream_engine.text import duration

MAX_REJECTED = 10
"""Rejected records of each reason that are shown."""


@dataclass
class SetAside:
    """Records that came to nothing: how many by stage and reason, and the first of each."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[Failure]] = field(default_factory=dict)

    @classmethod
    def read(cls, run: ReportedRun) -> SetAside:
        """Read all quarantine files, a line at a time."""
        found = cls({stage: Counter() for stage in ("input", *STAGES)})
        for name in quarantine_names(run):
            for failure in read_quarantine(run.run_dir.quarantine(name)):
                stage = failure.stage if failure.stage in STAGES else "input"
                found.counts[stage][failure.reason] += 1
                kept = found.examples.setdefault((stage, failure.reason), [])
                if len(kept) < MAX_REJECTED:
                    kept.append(failure)
        return found

    def at_stages(self) -> list[Failure]:
        """The examples whose samples, with their pictures, are in the run's shards."""
        return [
            failure
            for (stage, _), failures in self.examples.items()
            for failure in failures
            if stage in STAGES and failure.key
        ]

    def at_reading(self) -> list[Failure]:
        """The examples that were rejected when they were read."""
        return [
            failure
            for (stage, _), failures in sorted(self.examples.items())
            for failure in failures
            if stage not in STAGES
        ]


@dataclass(frozen=True)
class StageTime:
    """One stage's work: seconds are summed over its workers."""

    stage: str
    num_samples: int
    num_workers: int
    seconds: float
    tokens: int

    @property
    def shown_time(self) -> str:
        return duration(self.seconds)

    @property
    def tokens_per_s(self) -> str:
        return f"{self.tokens / self.seconds:,.0f}" if self.tokens and self.seconds else "–"

    @property
    def samples_per_s(self) -> str:
        return f"{self.num_samples / self.seconds:,.2f}" if self.seconds else "–"


def stage_times(headers: Sequence[ResultHeader]) -> list[StageTime]:
    """What the result files' headers say of the work that made them."""
    times = []
    for stage in STAGES:
        workers: set[str] = set()
        seconds, num_tokens, num_samples = 0.0, 0, 0
        for header in (header for header in headers if header.stage == stage):
            by = header.created_by
            workers.add(str(by.get("worker", "")))
            seconds += by.get("seconds", 0.0)
            num_tokens += by.get("tokens", 0)
            num_samples += header.num_samples
        times.append(StageTime(stage, num_samples, len(workers), seconds, num_tokens))
    return times


@dataclass(frozen=True)
class Figure:
    """A number that stands large."""

    name: str
    value: str
    note: str = ""


@dataclass
class Overview:
    """All that the first page's template is given, apart from the pairs that it links to."""

    figures: list[Figure]
    flow: Drawing
    adds_up: bool
    plots: list[Plot]
    bias: list[tuple[str, dict[str, Any]]]
    times: list[StageTime]
    beside: str
    """CPU of a question beside the models, by what it went into."""
    judge: list[tuple[str, str]]
    settings: list[tuple[str, list[tuple[str, str]]]]
    notes: list[str]


def overview(run: ReportedRun, found: Survey, aside: SetAside) -> Overview:
    """Put the first page together."""
    bands = bands_of(run, found, aside.counts)
    headers = [
        read_header(run.run_dir.result(stage, info.index))
        for stage in STAGES
        for info in run.shards()
    ]
    times = stage_times(headers)
    return Overview(
        figures=figures(run, found, times),
        flow=draw(bands),
        adds_up=all(band.adds_up for band in bands),
        plots=plots(found),
        beside=timing_from(headers).beside_line(),
        bias=[
            ("before balance", found.wins_before.to_dict()),
            ("after", found.wins_after.to_dict()),
        ],
        times=times,
        judge=list(judge_rows(run, found)),
        settings=list(settings_tables(run)),
        notes=list(notes(run)),
    )


def figures(run: ReportedRun, found: Survey, times: Sequence[StageTime]) -> list[Figure]:
    """The numbers that stand large."""
    margin = found.margins.to_dict()["mean"]
    rate = found.wins_after.to_dict()["rate"]
    flips = run.pipeline.judge_rates.get("flip_rate")
    shown = [
        Figure("pairs", f"{found.num_kept:,}", f"of {found.num_candidates:,} candidates"),
        Figure(
            "questions with a pair",
            f"{found.num_samples - found.pairs_per_question[0]:,}",
            f"of {run.inputs.samples['total']:,}",
        ),
        Figure(
            "mean margin", "–" if margin is None else f"{margin:.3g}", "chosen − rejected score"
        ),
        Figure(
            "longer answer chosen",
            "–" if rate is None else f"{rate:.0%}",
            "of pairs of unequal length; 50% is no bias",
        ),
        Figure("answers", f"{found.num_answers:,}", f"{run.config.sample_k} a question"),
        Figure("work", duration(sum(time.seconds for time in times)), "summed over workers"),
    ]
    if flips is not None and found.judge[flips[1]]:
        share = found.judge[flips[0]] / found.judge[flips[1]]
        shown.append(
            Figure("position flips", f"{share:.0%}", "of matches; the judge named one place")
        )
    return shown


def plots(found: Survey) -> list[Plot]:
    return [
        histogram(
            "Margins", "score of chosen − rejected", *binned(("margin", found.margins, "all"))
        ),
        histogram(
            "Scores",
            "score",
            *binned(
                ("rejected", found.rejected_scores, "rejected"),
                ("chosen", found.chosen_scores, "chosen"),
            ),
        ),
        counted(
            "Lengths",
            "words",
            [
                ("rejected", found.rejected_words, "rejected"),
                ("chosen", found.chosen_words, "chosen"),
            ],
        ),
        counted(
            "Difference in length",
            "words of chosen − rejected",
            [("difference", found.differences, "all")],
        ),
        counted(
            "Pairs per question",
            "pairs",
            [("questions", found.pairs_per_question, "all")],
            unit="questions",
            first=0,
        ),
    ]


def binned(*series: tuple[str, Histogram, str]) -> tuple[list[float], list[Series]]:
    """Histograms over the same bins, for a plot."""
    first = series[0][1]
    step = (first.greatest - first.least) / len(first.counts)
    if step == 0:
        step = 1.0 / len(first.counts)
    edges = [first.least + number * step for number in range(len(first.counts) + 1)]
    return edges, [Series(name, one.counts, kind) for name, one, kind in series]


def judge_rows(run: ReportedRun, found: Survey) -> Iterator[tuple[str, str]]:
    """What the judge did: rates first, then its counters."""
    for name, (part, whole) in sorted(run.pipeline.judge_rates.items()):
        if found.judge.get(whole):
            yield name.replace("_", " "), f"{found.judge[part] / found.judge[whole]:.3f}"
    for name, count in sorted(found.judge.items()):
        yield name.replace("_", " "), short(round(count, 6))


def settings_tables(run: ReportedRun) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Models, sampling, selection, inputs and versions."""
    for role, said in sorted(run.engines.items()):
        names = ("checkpoint", "family", "stage", "device", "dtype", "attention")
        rows = [(name, str(said[name])) for name in names if name in said]
        rows += [(name, shown(value)) for name, value in (said.get("sampling") or {}).items()]
        yield f"Model: {role}", rows
    if not run.engines:
        models = msgspec.to_builtins(run.config.part(ModelConfig))
        yield "Models", [(k, shown(v)) for k, v in models.items() if k.endswith("_path") and v]
    own = {"pipeline": run.pipeline.name, "beta": run.config.beta, **run.config.pipeline_options}
    yield "Pipeline", [(name, shown(value)) for name, value in own.items()]
    yield "Sampling", rows_of(msgspec.to_builtins(run.config.part(SamplingConfig)))
    yield "Selection", rows_of(msgspec.to_builtins(run.config.part(RankingConfig)))
    yield "Inputs", [(f"{number}", path) for number, path in enumerate(run.config.dataset_path, 1)]
    if len(rounds := run.stats.get("rounds", [])) > 1:
        yield "Rounds", [(str(one["round"]), round_line(one)) for one in rounds]
    yield "Versions", rows_of(run.versions)


def round_line(one: Mapping[str, Any]) -> str:
    """A round of stats.json in words."""
    of = f" of {one['instruct_model']}" if one["instruct_model"] else ""
    return f"{one['pairs']:,} pairs of {one['samples']:,} questions, answers{of}"


def rows_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, shown(value)) for name, value in values.items()]


def shown(value: Any) -> str:
    """A setting as a person reads it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None or value == "" else str(value)


def notes(run: ReportedRun) -> Iterator[str]:
    """What a reader must know before believing the numbers."""
    if not run.stats:
        yield "No dataset was written yet; these are the pairs that a merge would keep."
    elif not run.is_merged:
        yield (
            "The dataset was made from other results or settings than those that are here now; "
            "these are the pairs that the next merge would keep."
        )
    if run.inputs.missing:
        yield (
            f"{len(run.inputs.missing)} of {run.inputs.num_shards} shards have no results and are "
            "left out."
        )


def quarantine_names(run: ReportedRun) -> Iterator[str]:
    """The files of records that were set aside: those of the inputs, then those of the stages."""
    for known in run.inputs.manifest.inputs.values():
        if known.quarantine:
            yield known.quarantine
    for info in run.shards():
        for stage in STAGES:
            header = read_header(run.run_dir.result(stage, info.index))
            if header.quarantine:
                yield header.quarantine
