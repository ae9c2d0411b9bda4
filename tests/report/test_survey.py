"""The counts of a report are those of the merge, and its draw is fair, repeatable and small."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from stream_engine.records import Answer, AnswerScore, PromptDigest, SampleRewards, SampleRollouts
from stream_engine.report.places import KEPT, NUM_EXTREMES, Draw, PairFile, PairPlace, Place, Shown
from stream_engine.report.survey import survey, why_no_candidate
from tests.report.runs import merged_run, reported
from tests.synthetic import run_merge, write_example_run

SETTINGS = {"max_length_bias": 0.0, "max_pairs_per_sample": 2}


def test_the_counts_are_those_of_the_merge(tmp_path: Path) -> None:
    run = merged_run(tmp_path / "run", 60, **SETTINGS)
    found = survey(run, num_rows=20)
    stats = run.stats
    assert run.is_merged
    assert found.num_samples == stats["samples"]["scored"]
    assert found.num_candidates == stats["pairs"]["candidates"]
    assert found.num_kept == stats["pairs"]["written"]
    assert dict(found.dropped) == stats["pairs"]["dropped"]
    assert {"length_balance", "max_pairs_per_sample"} <= found.dropped.keys()
    assert found.margins.to_dict() == stats["margin"]
    assert found.wins_before.to_dict() == stats["length_wins_before_balance"]
    assert found.wins_after.to_dict() == stats["length_wins"]
    assert found.num_samples - found.pairs_per_question[0] == stats["samples"]["with_pairs"]
    assert sum(found.pairs_per_question.values()) == found.num_samples
    assert (
        sum(found.no_candidate.values()) + sum(found.all_dropped.values())
        == (found.pairs_per_question[0])
    )
    words = sum(n * count for n, count in found.chosen_words.items())
    assert words / found.num_kept == pytest.approx(stats["words"]["chosen"]["mean"], abs=1e-5)


def test_the_draw_has_the_extremes_and_some_of_each_reason(tmp_path: Path) -> None:
    run = merged_run(tmp_path / "run", 60, **SETTINGS)
    everything = survey(run, num_rows=10_000)
    drawn = survey(run, num_rows=7)
    kept = [shown for shown in everything.shown if shown.fate == KEPT]
    assert len(kept) == everything.num_kept
    margins = sorted(shown.pair.margin for shown in kept if shown.pair)
    for name, expected in (
        ("smallest margin", margins[:NUM_EXTREMES]),
        ("largest margin", margins[::-1][:NUM_EXTREMES]),
    ):
        found = [one.pair.margin for one in drawn.extremes[name] if one.pair]
        assert found == expected
        assert {name} <= {tag for one in drawn.shown for tag in one.tags}
    untagged = [shown for shown in drawn.shown if shown.fate == KEPT and not shown.tags]
    assert len(untagged) <= 7
    assert {shown.fate for shown in drawn.shown} == {KEPT, *drawn.dropped, *drawn.no_candidate}


def test_the_same_seed_draws_the_same_and_another_draws_others(tmp_path: Path) -> None:
    run = merged_run(tmp_path / "run", 40)
    first, again, other = (survey(run, num_rows=9, seed=seed).shown for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_each_pair_is_as_likely_to_be_drawn() -> None:
    """Of 20 pairs 5 are drawn 2000 times: each about 500 times, 6 standard deviations allowed."""
    drawn: Counter[int] = Counter()
    for seed in range(2000):
        draw = Draw(5, seed)
        for number in range(20):
            draw.offer(Shown(Place(0, number), None, KEPT))
        drawn.update(shown.place.number for shown in draw.result())
    assert sum(drawn.values()) == 10_000
    assert all(abs(drawn[number] - 500) < 6 * (2000 * 0.25 * 0.75) ** 0.5 for number in range(20))


def test_pairs_come_out_of_their_file_as_they_went_in() -> None:
    pairs = [PairPlace(3, 2**31, 9, 0, -1.5e300, 0.1, 7, 4_000_000_000, n) for n in range(9000)]
    with PairFile() as file:
        for pair in pairs:
            file.add(pair)
        assert list(file) == pairs


def test_a_run_without_a_dataset_is_reported_as_what_a_merge_would_keep(tmp_path: Path) -> None:
    run_dir = write_example_run(tmp_path / "run")
    before = reported(run_dir)
    assert not before.is_merged
    num_kept = survey(before, num_rows=5).num_kept
    merged = run_merge(run_dir)
    assert num_kept == merged.written + merged.dropped["needs_one_image"] > 0


def answers(*texts: str) -> SampleRollouts:
    return SampleRollouts(
        key="k",
        prompt=PromptDigest("", "", ""),
        answers=[
            Answer(index=i, text=text, token_ids=[], token_logps=[], finish_reason="stop")
            for i, text in enumerate(texts)
        ],
    )


@pytest.mark.parametrize(
    ("texts", "scores", "why"),
    [
        pytest.param(["a", "b"], [1.0], "one_scored", id="one-scored"),
        pytest.param(["a", "a"], [1.0, 2.0], "same_answers", id="same-text"),
        pytest.param(["a", "\u200ba"], [1.0, 2.0], "same_answers", id="read-the-same"),
        pytest.param(["a", "b"], [1.0, 1.0], "equal_scores", id="equal"),
        pytest.param(["a", "b"], [1.0, 2.0], "no_match", id="other"),
    ],
)
def test_why_a_question_has_no_pair(texts: list[str], scores: list[float], why: str) -> None:
    rewards = SampleRewards(
        key="k", scores=[AnswerScore(index=i, score=score) for i, score in enumerate(scores)]
    )
    assert why_no_candidate(answers(*texts), rewards) == why
