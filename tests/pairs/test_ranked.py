"""Datasets of answers: every one is written or dropped for a reason, in the order of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, ConservationError
from stream_engine.outputs.formats import RANKINGS, export_class, ranking_class
from stream_engine.outputs.formats.base import Ranking
from stream_engine.outputs.formats.trl import best_and_worst
from stream_engine.outputs.validate import validate
from stream_engine.pairs.merge_report import FormatReport
from stream_engine.pairs.ranked import ranked_row, write_ranking
from stream_engine.records import AnswerScore, SampleRewards
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    bytes_of,
    rows_of,
    synthetic_rollouts,
    synthetic_sample,
    write_example_run,
)

NUM_SCORED = 18  # of the example run's 20 samples, of 10 answers each


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return write_example_run(tmp_path / "run")


def rank(run_dir: RunDir, format: str, **settings: Any) -> FormatReport:
    config = RunConfig.create(settings)
    pipeline = SyntheticPipeline(config)
    return write_ranking(run_dir, config, pipeline, FINGERPRINTS, format=format)


def stats_of(report: FormatReport) -> dict[str, Any]:
    return json.loads((Path(report.folder) / "stats.json").read_text())


def test_ranked_has_every_answer_in_the_order_of_the_scores(run_dir: RunDir) -> None:
    report = rank(run_dir, "ranked")
    rows = rows_of(Path(report.folder))
    assert report.written == len(rows) == NUM_SCORED
    assert stats_of(report)["ranked"] == {"answers": 180, "written": 180, "dropped": {}}
    for row in rows:
        *scored, last = row["answers"]
        assert (last["score"], last["rank"], last["unfit"]) == (None, None, "unscored")
        assert [one["rank"] for one in scored] == list(range(1, 10))
        scores = [one["score"] for one in scored]
        assert scores == sorted(scores, reverse=True)
        assert json.loads(scored[0]["scores"])["sum"] == scores[0]
        number = int(row["idx"].removeprefix("idx-"))
        sample = synthetic_sample(number, num_images=0 if number == 5 else 1)
        answers = {answer.text: answer for answer in synthetic_rollouts(sample).answers}
        for one in row["answers"]:
            answer = answers[one["text"]]
            assert one["token_ids"] == answer.scored_ids
            assert one["token_logps"] == pytest.approx(answer.scored_logps)
            assert one["finish_reason"] == answer.finish_reason
    assert validate(report.folder) == []


@pytest.mark.parametrize(("rank_", "per_question"), [(1, 2), (3, 6), (5, 8)])
def test_kto_labels_the_best_and_the_worst(run_dir: RunDir, rank_: int, per_question: int) -> None:
    """Nine answers of a question have a score: of rank 5 four are best, and four worst."""
    report = rank(run_dir, "trl_kto", rank=rank_)
    rows = rows_of(Path(report.folder))
    dropped = stats_of(report)["ranked"]["dropped"]
    assert dropped["unscored"] == NUM_SCORED
    assert len(rows) == report.written == 180 - sum(dropped.values())
    for key in {row["key"] for row in rows}:
        scores = {
            label: [r["score"] for r in rows if r["key"] == key and r["label"] == label]
            for label in (True, False)
        }
        assert len(scores[True]) == len(scores[False]) <= per_question // 2
        assert min(scores[True]) > max(scores[False])
    assert len(rows) > 0.9 * NUM_SCORED * per_question
    assert validate(report.folder) == []


def test_the_best_answers_are_whole_and_no_repetitions(run_dir: RunDir) -> None:
    """The synthetic last answer of a question is cut off."""
    one, two = (rank(run_dir, "trl_sft", best=best) for best in (1, 2))
    assert (one.written, two.written) == (NUM_SCORED, 2 * NUM_SCORED)
    assert two.dropped == {
        "cut_off": NUM_SCORED,
        "unscored": NUM_SCORED,
        "not_among_best": 180 - 4 * NUM_SCORED,
    }
    rows = rows_of(Path(two.folder))
    ranked = {r["key"]: r["answers"] for r in rows_of(Path(rank(run_dir, "ranked").folder))}
    for first, second in zip(rows[::2], rows[1::2]):
        fit = [
            a["text"]
            for a in ranked[first["key"]]
            if not a["unfit"] and a["finish_reason"] == "stop"
        ]
        texts = [row["completion"][0]["content"][0]["text"] for row in (first, second)]
        assert texts == fit[:2]
    assert validate(two.folder) == []


def test_answers_that_are_no_examples_are_named_and_ties_are_not_decided() -> None:
    sample = synthetic_sample(1)
    drawn = synthetic_rollouts(sample, 8)
    texts = ["red one", "red one", " ", "an <image> of it", "blue", "green", "a b c", "d e f"]
    answers = [replace(answer, text=text) for answer, text in zip(drawn.answers, texts)]
    rollouts = replace(drawn, answers=answers)
    scores = [5.0, 4.0, 4.0, 3.0, 1.0, 1.0, 1.0, 0.0]
    rewards = SampleRewards(
        key=sample.key, scores=[AnswerScore(index=i, score=s) for i, s in enumerate(scores)]
    )
    row = ranked_row(sample, rollouts, rewards, RunConfig())
    unfit = ["", "near_duplicate", "empty_answer", "image_tag", "", "", "", ""]
    assert [one.unfit for one in row.answers] == unfit
    assert [one.rank for one in row.answers] == [1, 2, 2, 4, 5, 5, 5, 8]
    good, bad = best_and_worst(row.fit, 2)  # of red one, blue, green, a b c, d e f
    assert [one.answer.text for one in good] == ["red one"]
    assert [one.answer.text for one in bad] == ["d e f"]


@pytest.mark.parametrize("name", RANKINGS)
def test_twice_gives_the_same_bytes_and_writes_nothing(run_dir: RunDir, name: str) -> None:
    folder = Path(rank(run_dir, name, test_fraction=0.4).folder)
    before, inodes = bytes_of(folder), [path.stat().st_ino for path in folder.iterdir()]
    rank(run_dir, name, test_fraction=0.4)
    assert bytes_of(folder) == before
    assert [path.stat().st_ino for path in folder.iterdir()] == inodes
    assert list(json.loads(before["stats.json"])["splits"]) == ["train", "test"]
    (folder / "README.md").unlink()
    rank(run_dir, name, test_fraction=0.4)
    assert bytes_of(folder) == before


def test_answers_that_vanish_are_told(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_rows(self: Ranking, row: object) -> tuple[list[dict[str, Any]], dict[str, int]]:
        return [], {}

    monkeypatch.setattr(RANKINGS["trl_sft"], "to_rows", to_rows)
    with pytest.raises(ConservationError, match="make 180 rows, but the files hold 0"):
        rank(run_dir, "trl_sft")
    assert not (run_dir.root / "dataset_trl_sft").exists()


def test_each_kind_of_format_names_the_command_of_the_other() -> None:
    with pytest.raises(ConfigError, match="rank WORK_DIR --format trl_kto"):
        export_class("trl_kto")
    with pytest.raises(ConfigError, match="export WORK_DIR --format trl_reward"):
        ranking_class("trl_reward")
    with pytest.raises(ConfigError, match="did you mean 'ranked'"):
        ranking_class("rank")
