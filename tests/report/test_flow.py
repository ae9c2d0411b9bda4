"""The picture of a run's flow: at every step in = out + lost, by reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from stream_engine.report.flow import Band, Loss, Step, bands_of, draw
from stream_engine.report.overview import SetAside
from stream_engine.report.survey import survey
from tests.report.runs import reported
from tests.synthetic import run_merge, write_example_run


def test_a_run_with_all_kinds_of_losses_adds_up(tmp_path: Path) -> None:
    run_dir = write_example_run(tmp_path / "run")
    merged = run_merge(run_dir)
    run = reported(run_dir)
    aside = SetAside.read(run)
    bands = bands_of(run, survey(run, num_rows=5), aside.counts)
    questions, pairs = bands
    assert questions.adds_up and pairs.adds_up
    assert [step.count for step in questions.steps[:3]] == [20, 20, 18]
    assert {loss.reason: loss.count for loss in questions.steps[1].losses} == {
        "rollouts: synthetic": 1,
        "rewards: synthetic": 1,
    }
    assert pairs.steps[0].count == merged.candidates
    assert pairs.steps[-1].count == merged.written
    assert Counter({"needs one image": merged.dropped["needs_one_image"]}) == Counter(
        {loss.reason: loss.count for loss in pairs.steps[1].losses}
    )


def test_a_band_that_loses_more_than_it_says_does_not_add_up() -> None:
    assert Band("x", [Step("in", 5, [Loss("torn", 2)]), Step("out", 3)]).adds_up
    assert not Band("x", [Step("in", 5, [Loss("torn", 1)]), Step("out", 3)]).adds_up


def test_the_drawing_says_every_number_in_words() -> None:
    drawing = draw([Band("x", [Step("in", 5000, [Loss("torn", 2000)]), Step("out", 3000)])])
    assert drawing.summary == "5,000 in = 3,000 out + 2,000 lost (2,000 torn)."
    texts = [label.text for label in drawing.labels]
    assert {"5,000", "3,000", "−2,000 torn"} <= set(texts)
    assert all(label.y <= drawing.height for label in drawing.labels)


def test_nothing_at_all_is_drawn_too() -> None:
    assert draw([Band("x", [Step("in", 0), Step("out", 0)])]).shapes
