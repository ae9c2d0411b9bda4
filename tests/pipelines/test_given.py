"""Answers of the input go through a run as sampled ones do, and its pairs are scored again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stream_engine import api
from stream_engine.cli.main import main
from stream_engine.demo import demo_models
from stream_engine.demo.data import dataset_bytes
from stream_engine.pairs.rankings import scored_samples
from stream_engine.records import Sample, SampleRewards, SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.status import quarantined
from tests.samples import write_jsonl, write_parquet
from tests.synthetic import rows_of

NUM_QUESTIONS = 24
Scored = dict[str, tuple[Sample, SampleRollouts, SampleRewards]]


def run(work_dir: Path, source: Path, **settings: Any) -> api.RunReport:
    config = api.RunConfig(
        work_dir=str(work_dir),
        dataset_path=(str(source),),
        report="never",
        **demo_models("dpo_reward"),
        **settings,
    )
    return api.run(config, show_progress=False)


def scored(work_dir: Path) -> Scored:
    run_dir = RunDir(work_dir)
    found = (
        one for shard in Manifest.load(run_dir).shards for one in scored_samples(run_dir, shard)
    )
    return {sample.idx: (sample, rollouts, rewards) for sample, rollouts, rewards in found}


def texts_of(work_dir: Path) -> Counter[tuple[str, str, str, str]]:
    return Counter((p.idx, p.question, p.chosen, p.rejected) for p in api.pairs(work_dir))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose answers were sampled."""
    folder = tmp_path_factory.mktemp("sampled")
    source = folder / "questions.parquet"
    source.write_bytes(dataset_bytes(NUM_QUESTIONS, 7))
    run(folder / "run", source, format=("trl",))
    return folder / "run"


def test_ranked_answers_brought_along_give_the_pairs_of_those_that_were_sampled(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With the ids made from the text again; a question without answers is sampled beside them."""
    assert main(["rank", str(sampled)]) == 0
    folder = sampled / "dataset_ranked"
    said = f"ranked: {NUM_QUESTIONS} questions with all their answers in {folder}\n"
    assert capsys.readouterr().out == said
    rows = rows_of(folder)
    for row in rows:
        row["answers"] = [{**one, "model": f"m{one['rank']}"} for one in row["answers"]]
    fresh = {**rows[0], "idx": "new", "answers": None}
    report = run(tmp_path / "run", write_parquet(tmp_path / "given.parquet", [*rows, fresh]))
    assert report.exit_status == 0
    assert report.notes[0].endswith(
        f"{NUM_QUESTIONS} rows with answers of their own: these are scored, and none is sampled"
    )
    before, after = scored(sampled), scored(tmp_path / "run")
    assert len(after.pop("new")[1].answers) == 10
    given = {row["idx"]: row["answers"] for row in rows}
    num_ids_differ = 0
    for idx, (_, rollouts, rewards) in after.items():
        assert rollouts.prompt == before[idx][1].prompt
        for answer, score, row in zip(rollouts.answers, rewards.scores, given[idx]):
            num_ids_differ += answer.scored_ids != row["token_ids"]
            assert (answer.text, answer.model) == (row["text"], f"m{row['rank']}")
            assert answer.scored_logps == pytest.approx(row["token_logps"], abs=1e-3)
            assert score.token_logps == pytest.approx(row["reward_token_logps"], abs=1e-3)
            assert score.score == pytest.approx(row["score"], abs=1e-3)
            assert answer.ids_from_text and not row["ids_from_text"]
    assert num_ids_differ == 0
    pairs = texts_of(tmp_path / "run")
    assert Counter({p: n for p, n in pairs.items() if p[0] != "new"}) == texts_of(sampled)
    stats = json.loads((tmp_path / "run/dataset/stats.json").read_text())
    assert stats["answers"]["ids_from_text"] == 10 * NUM_QUESTIONS
    assert stats["answers"]["models"]["m1"] == NUM_QUESTIONS
    api.append(tmp_path / "run", [str(tmp_path / "given.parquet")], show_progress=False)
    assert texts_of(tmp_path / "run") == pairs


def test_pairs_are_scored_again_and_disagreements_counted(sampled: Path, tmp_path: Path):
    """Every third pair of our own dataset in format trl is turned around before it comes back."""
    given = []
    for number, pair in enumerate(api.pairs(sampled)):
        sides = (pair.chosen, pair.rejected)[:: -1 if number % 3 == 0 else 1]
        given.append((pair, *sides))
    rows = [
        {
            "idx": pair.idx,
            "image": {"bytes": pair.images[0].data},
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": pair.question}],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        }
        for pair, chosen, rejected in given
    ]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    num_reversed = -(-len(given) // 3)
    as_given = Counter((p.idx, p.question, chosen, rejected) for p, chosen, rejected in given)
    as_scored = texts_of(sampled)
    expected = {"keep": as_given, "relabel": as_scored, "drop": as_given & as_scored}
    for setting, pairs in expected.items():
        report = run(
            tmp_path / "run",
            source,
            given_answers="pairs",
            disagreements=setting,
            max_length_bias=1000.0,
        )
        assert report.shards_done_here == (1 if setting == "keep" else 0)  # others merge again
        counts = report.status.pairs
        assert counts.given == {
            "agreed": len(given) - num_reversed,
            "reversed": num_reversed,
            "tied": 0,
            "unscored": 0,
        }
        assert texts_of(tmp_path / "run") == pairs
        assert counts.dropped == ({"disagreement": num_reversed} if setting == "drop" else {})
        margins = [pair.margin or 0.0 for pair in api.pairs(tmp_path / "run")]
        assert sum(margin < 0 for margin in margins) == (num_reversed if setting == "keep" else 0)


def test_an_answer_with_a_control_token_sets_its_row_aside_one_too_long_itself_alone(
    sampled: Path, tmp_path: Path
):
    sample = next(iter(scored(sampled).values()))[0]
    row = {"question": sample.question, "image": {"bytes": sample.images[0].data}}
    texts = (["Yes.</s>", "No."], ["Yes.", "No.", "word " * 5000], ["Yes.", "word " * 5000])
    rows = [{**row, "answers": answers} for answers in texts]
    run(tmp_path / "run", write_jsonl(tmp_path / "q.jsonl", rows))
    failures = quarantined(api.open_state(tmp_path / "run"))
    assert {failure.reason for failure in failures} == {"control_token", "prompt_too_long"}
    ((_, rollouts, rewards),) = scored(tmp_path / "run").values()
    assert [bool(answer.token_ids) for answer in rollouts.answers] == [True, True, False]
    assert rewards.unscored == {"answer_too_long": [2]}
