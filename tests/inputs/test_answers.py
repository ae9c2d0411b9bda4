"""Answers that rows bring: what is read of them, what is rejected, and which key they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stream_engine.inputs.answers import MAX_ANSWERS
from stream_engine.inputs.ingest import ingest
from stream_engine.inputs.validate import InputCheck
from stream_engine.records import Failure, GivenAnswer, Sample, sample_key
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import read_shard
from tests.inputs.formats import read
from tests.samples import input_config, write_jsonl, write_parquet

SIDES = [("Yes.", "chosen"), ("No.", "rejected")]


def one(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Sample | Failure:
    (found,) = read(write_jsonl(tmp_path / "q.jsonl", [{"idx": 7, **row}]), **settings)
    return found


def turn(text: str, who: str = "assistant") -> dict[str, str]:
    return {"role": who, "content": text}


def test_answers_are_texts_or_say_more(tmp_path: Path):
    answers = ["Yes.", {"text": "No", "model": "m", "finish_reason": "length", "score": 3.0}]
    expected = (
        GivenAnswer(text="Yes."),
        GivenAnswer(text="No", model="m", finish_reason="length"),
    )
    assert one(tmp_path, {"question": "?", "answers": answers}).answers == expected
    texts = [{"text": "Yes.", "model": None}, {"text": "", "model": "m"}]
    (found,) = read(write_parquet(tmp_path / "a.parquet", [{"question": "?", "answers": texts}]))
    assert found.answers == (GivenAnswer(text="Yes."), GivenAnswer(text="", model="m"))
    (tmp_path / "a.csv").write_text('question,answers\n?,"[""Yes."", ""No.""]"\n')
    (found,) = read(tmp_path / "a.csv")
    assert [answer.text for answer in found.answers] == ["Yes.", "No."]


def test_other_answers_are_another_sample_and_none_leave_the_key_as_it_was(tmp_path: Path):
    """Keys of rows without answers are those of runs that began before answers were read."""
    plain = one(tmp_path, {"question": "?"})
    assert plain.key == sample_key("7", "?", ()) == "c1752b77587edc6d1690f1125164bf34"
    keys = [
        one(tmp_path, {"question": "?", "answers": answers}).key
        for answers in (["a", "b"], ["b", "a"], ["ab"], [{"text": "a", "model": "m"}, "b"])
    ]
    assert len({plain.key, *keys}) == 5
    assert one(tmp_path, {"question": "?", "answers": None}).key == plain.key
    ignored = one(tmp_path, {"question": "?", "answers": ["a"]}, given_answers="ignore")
    assert ignored.key == plain.key and not ignored.answers


def test_turns_in_a_cell_of_text_are_answers(tmp_path: Path):
    """A csv of pairs was scored with the JSON of its turns as answers."""
    sides = {"chosen": f'[{{"role": "assistant", "content": "{SIDES[0][0]}"}}]'}
    sides["rejected"] = str([turn("?", "user"), turn(SIDES[1][0])])
    found = one(tmp_path, {"question": "?", **sides}, given_answers="pairs")
    assert [(answer.text, answer.given_as) for answer in found.answers] == SIDES


@pytest.mark.parametrize("text", ['[{"bbox": [1, 2], "label": "a"}]', '{"role": "cat"}', "['a']"])
def test_an_answer_that_is_json_itself_is_text(tmp_path: Path, text: str):
    found = one(tmp_path, {"question": "?", "chosen": text, "rejected": "b"}, given_answers="pairs")
    assert [answer.text for answer in found.answers] == [text, "b"]
    turns = '{"from": "gpt", "value": "a"}'
    found = one(
        tmp_path, {"question": "?", "chosen": turns, "rejected": "b"}, given_answers="pairs"
    )
    assert [answer.text for answer in found.answers] == ["a", "b"]


def test_answers_to_another_question_than_the_rows_are_rejected(tmp_path: Path):
    sides = {"chosen": [turn("Else?", "user"), turn("Yes.")]}
    sides["rejected"] = [turn("Else?", "user"), turn("No.")]
    found = one(tmp_path, {"question": "Why?", **sides}, given_answers="pairs")
    assert found.reason == "different_questions"
    found = one(tmp_path, {"question": "Else? ", **sides}, given_answers="pairs")
    assert len(found.answers) == 2


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        pytest.param([], "no_answers", id="empty-list"),
        pytest.param("Yes.", "invalid_answers", id="text"),
        pytest.param({"text": ["Yes."]}, "invalid_answers", id="dict"),
        pytest.param(["Yes.", 5], "invalid_answer", id="number"),
        pytest.param(["Yes.", None], "invalid_answer", id="null"),
        pytest.param([["Yes."]], "invalid_answer", id="list-in-list"),
        pytest.param([{"answer": "Yes."}], "invalid_answer", id="no-text"),
        pytest.param([{"text": "a", "finish_reason": "eos"}], "invalid_answer", id="reason"),
        pytest.param([{"text": "a", "given_as": "better"}], "invalid_answer", id="side"),
        pytest.param(["half \ud800"], "invalid_text", id="surrogate"),
        pytest.param(["a"] * (MAX_ANSWERS + 1), "too_many_answers", id="too-many"),
    ],
)
def test_bad_answers_are_named_rejects(tmp_path: Path, answers: Any, reason: str):
    found = one(tmp_path, {"question": "?", "answers": answers})
    assert isinstance(found, Failure) and (found.reason, found.idx) == (reason, "7")


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"question": "Is it?", "chosen": "Yes.", "rejected": "No."},
    "trl": {
        "prompt": [turn("Is it?", "user")],
        "chosen": [turn("Yes.")],
        "rejected": [turn("No.")],
    },
    "trl-implicit-prompt": {
        "chosen": [turn("Is it?", "user"), turn("Yes.")],
        "rejected": [turn("Is it?", "user"), turn("No.")],
    },
    "trl-parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
    },
    "llama-factory": {
        "conversations": [{"from": "human", "value": "Is it?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "ms-swift": {
        "messages": [turn("Is it?", "user"), turn("Yes.")],
        "rejected_response": "No.",
    },
    "ms-swift-messages": {
        "messages": [turn("Is it?", "user"), turn("Yes.")],
        "rejected_messages": [turn("Is it?", "user"), turn("No.")],
    },
}


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_are_read_as_trainers_write_them(tmp_path: Path, layout: str):
    sample = one(tmp_path, PAIRS[layout], given_answers="pairs")
    assert sample.question == "Is it?"
    assert [(answer.text, answer.given_as) for answer in sample.answers] == SIDES
    if layout != "trl-implicit-prompt":
        assert one(tmp_path, PAIRS[layout]).answers == ()


def test_a_pair_says_its_models_and_may_have_several_worse_answers(tmp_path: Path):
    row = {"question": "?", "chosen": "a", "rejected": ["b", "c"], "chosen_model": "m"}
    sample = one(tmp_path, row, given_answers="pairs")
    assert [(a.text, a.given_as, a.model) for a in sample.answers] == [
        ("a", "chosen", "m"),
        ("b", "rejected", ""),
        ("c", "rejected", ""),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"question": "?", "chosen": "a"}, "incomplete_pair", id="half"),
        pytest.param(
            {"question": "?", "chosen": 1, "rejected": "b"}, "invalid_answer", id="number"
        ),
        pytest.param({"question": "?", "chosen": [], "rejected": "b"}, "no_answers", id="empty"),
        pytest.param(
            {"question": "?", "chosen": [turn("a", "user")], "rejected": "b"},
            "unknown_turns",
            id="no-assistant",
        ),
        pytest.param(
            {
                "question": "?",
                "chosen": [turn("s", "system"), turn("q", "user"), turn("a")],
                "rejected": "b",
            },
            "turns_before_question",
            id="system-prompt",
        ),
        pytest.param(
            {"chosen": [turn("q", "user"), turn("a")], "rejected": [turn("r", "user"), turn("b")]},
            "different_questions",
            id="questions",
        ),
    ],
)
def test_bad_pairs_are_named_rejects(tmp_path: Path, row: dict[str, Any], reason: str):
    found = one(tmp_path, row, given_answers="pairs")
    assert isinstance(found, Failure) and found.reason == reason


def test_what_is_read_of_pairs_is_told_and_so_is_what_is_left_out(tmp_path: Path):
    """A dataset of pairs had its answers sampled anew without a word."""
    rows = [
        {"idx": 1, "question": "?", "chosen": "a", "rejected": "b"},
        {"idx": 2, "question": "?", "chosen": "a", "rejected": " a\u200b\n"},
        {"idx": 3, "question": "?", "chosen": None, "rejected": None},
    ]
    source = str(write_jsonl(tmp_path / "q.jsonl", rows))
    told = {}
    for reads in ("pairs", "answers", "ignore"):
        check = InputCheck(source, input_config(given_answers=reads))
        assert list(check.problems()) == []
        told[reads] = dict(check.notes)
    assert told["pairs"] == {"with_answers": 2, "one_answer": 1}
    assert told["answers"] == {"unread_pair": 2} and told["ignore"] == {}


def test_pairs_of_one_question_may_share_its_id_and_are_read_once(tmp_path: Path):
    """A dataset of pairs has up to three rows of one question, all with its id."""
    row = {"idx": 7, "question": "?", "chosen": "a", "rejected": "b"}
    rows = [row, {**row, "rejected": "c"}, row, {"idx": 8, "question": "??"}]
    source = write_jsonl(tmp_path / "q.jsonl", rows)
    run_dir, config = RunDir(tmp_path / "run"), input_config(given_answers="pairs")
    report = ingest(run_dir, [str(source)], config)
    assert (report.added, report.known, report.num_rejected) == (3, 1, 0)
    (shard,) = Manifest.load(run_dir).shards
    samples = list(read_shard(run_dir.shard(0), shard))
    texts = [[answer.text for answer in sample.answers] for sample in samples]
    assert texts == [["a", "b"], ["a", "c"], []]
    assert [sample.idx for sample in samples] == ["7", "7", "8"]

    write_jsonl(source, [*rows, {**row, "chosen": "d"}])
    again = ingest(run_dir, [str(source)], config)
    assert (again.added, again.known, again.num_rejected) == (1, 4, 0)


def test_the_shards_of_a_run_are_read_with_their_answers(tmp_path: Path):
    rows = [{"idx": 7, "question": "?", "chosen": "a", "rejected": "b"}]
    source = write_jsonl(tmp_path / "q.jsonl", rows)
    run_dir = RunDir(tmp_path / "run")
    ingest(run_dir, [str(source)], input_config(given_answers="pairs"))
    (sample,) = read(run_dir.shard(0))
    (before,) = read(source, given_answers="pairs")
    assert sample == before
