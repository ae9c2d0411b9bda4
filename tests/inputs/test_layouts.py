"""Rows of other tools' layouts, and columns under other names."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.inputs.readers import read_rows
from stream_engine.inputs.unread import Unread
from stream_engine.records import Sample
from tests.inputs.formats import read
from tests.samples import input_config, picture, write_jsonl, write_parquet

BASE64 = base64.b64encode(picture(1)).decode()
IMAGE = {"type": "image"}
TEXT = {"type": "text", "text": "Why?"}
BESIDE = {"images": [BASE64]}


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


LAYOUTS: dict[str, dict[str, Any]] = {
    "llava": {
        "id": "7",
        "image": BASE64,
        "conversations": [
            {"from": "human", "value": "<image>\nWhy?"},
            {"from": "gpt", "value": "So."},
        ],
    },
    "messages": {"idx": "7", "images": [BASE64], "messages": chat(("user", "<image>Why?"))},
    "parts": {"idx": "7", "images": [BASE64], "messages": chat(("user", [IMAGE, TEXT]))},
    "openai": {
        "idx": "7",
        "messages": chat(
            ("user", [{"type": "image_url", "image_url": {"url": f"data:;base64,{BASE64}"}}, TEXT])
        ),
    },
    "own-picture": {"id": 7, "messages": chat(("user", [{**IMAGE, "image": BASE64}, TEXT]))},
    "empty-system": {
        "idx": "7",
        "image": BASE64,
        "messages": chat(("system", ""), ("user", "Why?")),
    },
    "blank-system": {
        "idx": "7",
        "image": BASE64,
        "messages": chat(("system", [{"type": "text", "text": " "}]), (" User ", "Why?")),
    },
    "mixed-names": {"idx": "7", "image": BASE64, "messages": [{"role": "user", "value": "Why?"}]},
    "picture-beside": {"idx": 7, "messages": [{"role": "user", "content": "Why?", **BESIDE}]},
    "responses": {
        "idx": "7",
        "messages": chat(
            (
                "user",
                [
                    {"type": "input_image", "image_url": f"data:;base64,{BASE64}"},
                    {"type": "input_text", "text": "Why?"},
                ],
            )
        ),
    },
    "sequence-of-dicts": {
        "idx": "7",
        "image": BASE64,
        "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhy?", "So."]},
    },
    "as-pandas-writes-it": {
        "idx": "7",
        "images": f"['{BASE64}']",
        "conversations": "[{'from': 'human', 'value': 'Why?'}]",
    },
    "prompt-as-text": {"idx": "7", "image": BASE64, "prompt": json.dumps(chat(("user", "Why?")))},
    "trl": {"idx": "7", "images": [BASE64], "prompt": chat(("user", [IMAGE, TEXT]))},
    "trl-plain": {"idx": "7", "images": [BASE64], "prompt": "Why?"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_its_first_question(tmp_path: Path, layout: str):
    (sample,) = read(write_jsonl(tmp_path / "q.jsonl", [LAYOUTS[layout]]), text_only="reject")
    assert (sample.idx, sample.question) == ("7", "Why?")
    assert [image.data for image in sample.images] == [picture(1)]


def test_a_picture_between_words_keeps_its_place(tmp_path: Path):
    parts = [{"type": "text", "text": "Is "}, IMAGE, {"type": "text", "text": " so?"}]
    row = {"image": BASE64, "messages": chat(("user", parts))}
    (sample,) = read(write_jsonl(tmp_path / "q.jsonl", [row]))
    assert sample.question == "Is <image> so?"


def test_later_turns_are_left_out_and_said_so(tmp_path: Path):
    turns = chat(("user", "Why?"), ("assistant", "So."), ("user", "And?"))
    path = write_jsonl(tmp_path / "q.jsonl", [{"image": BASE64, "messages": turns}])
    (row,) = read_rows(str(path), input_config())
    assert isinstance(row.item, Sample)
    assert (row.item.question, row.notes) == ("Why?", ("later_turns",))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": chat(("system", "Be brief."), ("user", "Why?"))}, "turns_before_question"),
        ({"prompt": chat(("user", "A?"), ("user", "B?"))}, "turns_before_question"),
        ({"messages": chat(("assistant", "So."))}, "unknown_turns"),
        ({"conversations": ["Why?"]}, "unknown_turns"),
        ({"messages": chat(("user", [{"type": "video"}]))}, "unsupported_content"),
        ({"messages": chat(("user", {"a": 1}))}, "unsupported_content"),
        ({"messages": chat(("user", [IMAGE, IMAGE, TEXT]))}, "image_mark_mismatch"),
        ({"messages": chat(("user", "A?"), ("user", "<image> B?"))}, "image_mark_mismatch"),
        ({"messages": chat(("user", "A?"), ("user", [IMAGE, TEXT]))}, "image_mark_mismatch"),
        ({"messages": [{"role": "user", "content": "?", "images": ["b"]}]}, "missing_image_file"),
        ({"messages": [{"role": "user", "parts": [TEXT]}]}, "unknown_turns"),
        ({"conversations": "human: Why?"}, "unknown_turns"),
        ({"conversations": {"from": "human", "text": "Why?"}}, "unknown_turns"),
        ({"messages": chat(("user", "Why?")), "system": "Be brief."}, "turns_before_question"),
        ({"question": "And?", "history": [["Why?", "So."]]}, "turns_before_question"),
    ],
)
def test_what_would_be_lost_is_rejected_by_name(tmp_path: Path, row: dict, reason: str):
    path = write_jsonl(tmp_path / "q.jsonl", [json.dumps({"image": BASE64, **row})])
    (failure,) = read(path)
    assert failure.reason == reason


def test_a_prompt_in_brackets_is_text(tmp_path: Path):
    prompts = ["[1, 2], and then?", "[]", '["draw"]']
    rows = [{"prompt": prompt, "image": BASE64} for prompt in prompts]
    assert [s.question for s in read(write_jsonl(tmp_path / "q.jsonl", rows))] == prompts


def test_a_file_that_is_no_picture_is_none(tmp_path: Path):
    row = {"question": "Why?", "file_name": "notes.txt"}
    (sample,) = read(write_jsonl(tmp_path / "q.jsonl", [row]), text_only="allow")
    assert sample.images == ()


def test_the_speakers_of_a_conversation_without_a_user_are_told(tmp_path: Path):
    row = {"image": BASE64, "messages": chat(("customer", "Why?"), ("agent", "So."))}
    (failure,) = read(write_jsonl(tmp_path / "q.jsonl", [row]))
    assert failure.detail == "messages has no turn of a user, but of 'customer', 'agent'"


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "What happens?", "videos": ["v.mp4"]}, "unsupported_content"),
        ({"question": "<audio>\nWho?", "audio": "a.wav", "image": BASE64}, "unsupported_content"),
        ({"question": "Why?", "video": "v.mp4", "image": BASE64}, "sample"),
        ({"question": "Why?", "videos": [], "image_paths": ["b.png"]}, "sample"),
        ({"question": "Why?", "image_paths": ["gone.png"]}, "missing_image_file"),
        ({"question": "Why?", "file_name": "b.png"}, "sample"),
    ],
)
def test_a_question_is_not_asked_without_what_it_is_about(
    tmp_path: Path, name: str, row: dict, reason: str
):
    (tmp_path / "b.png").write_bytes(OTHER)
    write = write_jsonl if name.endswith("jsonl") else write_parquet
    (item,) = read(write(tmp_path / name, [row]), text_only="allow")
    assert getattr(item, "reason", "sample") == reason
    assert reason != "sample" or len(item.images) == 1


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
def test_columns_under_other_names_are_mapped(tmp_path: Path, name: str):
    row = {"query": "Why?", "img": BASE64, "uid": 7, "question": "not this"}
    write = write_jsonl if name.endswith("jsonl") else write_parquet
    columns = {"question": "query", "image": "img", "idx": "uid"}
    (sample,) = read(write(tmp_path / name, [row]), columns=columns, text_only="reject")
    assert (sample.idx, sample.question, len(sample.images)) == ("7", "Why?", 1)


OTHER = picture(2)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "image": BASE64, "images": [{"bytes": OTHER}]},
        {"messages": chat(("user", [{**IMAGE, "image": BASE64}, TEXT])), "images": ["other.png"]},
    ],
)
def test_of_two_columns_with_different_pictures_none_is_lost(tmp_path: Path, row: dict):
    (tmp_path / "other.png").write_bytes(OTHER)
    (failure,) = read(write_parquet(tmp_path / "q.parquet", [row]))
    assert failure.reason == "two_pictures"


@pytest.mark.parametrize("image", [BASE64, "where/it/came/from.png", "https://a.b/c.png", 7])
def test_a_picture_that_is_told_twice_is_one(tmp_path: Path, image: object):
    row = {"question": "Why?", "image": image, "images": [BASE64]}
    (sample,) = read(write_jsonl(tmp_path / "q.jsonl", [row]))
    assert len(sample.images) == 1


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"image": "photo"}, {"question": "Why?", "photo": BASE64, "images": [{"bytes": OTHER}]}),
        ({"images": "photo"}, {"question": "Why?", "photo": BASE64, "image": {"bytes": OTHER}}),
        ({"messages": "ask"}, {"question": "no", "ask": chat(("user", "Why?")), "image": BASE64}),
    ],
)
def test_a_column_that_is_named_goes_before_others(tmp_path: Path, columns: dict, row: dict):
    (sample,) = read(write_parquet(tmp_path / "q.parquet", [row]), columns=columns)
    assert sample.question == "Why?" and sample.images[0].data == base64.b64decode(BASE64)


def test_lists_stand_in_csv_as_json_text(tmp_path: Path):
    (tmp_path / "[1].png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(OTHER)
    turns = chat(("user", "In <image> and <image>?"))
    cells = [json.dumps(cell).replace('"', '""') for cell in (turns, ["[1].png", "b.png"])]
    (tmp_path / "q.csv").write_text('messages,images\n"{}","{}"\n'.format(*cells))
    (sample,) = read(tmp_path / "q.csv")
    assert sample.question == "In <image> and <image>?"
    assert [image.data for image in sample.images] == [picture(1), OTHER]


def test_a_mapped_column_that_no_row_has_is_told(tmp_path: Path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Why?", "image": BASE64}])
    unread = Unread()
    columns = {"image": "img", "question": "question"}
    list(read_rows(str(path), input_config(columns=columns), unread=unread))
    assert "--columns names what no row has: img" in unread.lines()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("query", "write ours=yours"),
        ("question=", "write ours=yours"),
        ("image=a,image=b", "maps 'image' twice"),
        ("qestion=query", "did you mean 'question'"),
    ],
)
def test_a_mapping_that_says_nothing_is_refused(columns: str, words: str):
    with pytest.raises(ConfigError, match=words):
        RunConfig.create({"columns": columns})


def test_a_mapping_is_kept_in_a_run():
    config = RunConfig.create({"columns": "question=query, image=img"})
    assert config.columns == {"question": "query", "image": "img"}
    assert RunConfig.create(config.to_dict()) == config
