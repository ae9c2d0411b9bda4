"""The question as it will be asked: its ends, its bytes, its image marks."""

import pytest

from stream_engine.errors import RecordError
from stream_engine.inputs.questions import foreign_mark, question_of, with_pictures_placed
from stream_engine.records import prompt_parts


@pytest.mark.parametrize(
    "given",
    [
        "\ufeffWhat is it?",
        "What is it?\n",
        "What is it?\r\n\r\n",
        b"What is it?",
        b"\xef\xbb\xbfWhat is it?\r\n",
        memoryview(b"What is it?"),
    ],
)
def test_what_editors_leave_at_the_ends_goes(given):
    assert question_of(given) == "What is it?"


def test_white_space_inside_and_in_front_stays():
    assert question_of("  a\r\nb\rc ") == "  a\nb\nc "


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "missing_question"),
        (float("nan"), "missing_question"),
        (" \r\n", "empty_question"),
        ("\ufeff", "empty_question"),
        (7, "invalid_question"),
        (["a"], "invalid_question"),
        (b"\xff\xfe", "invalid_text"),
        ("\ud800", "invalid_text"),
    ],
)
def test_what_is_no_question_is_rejected_by_name(given, reason):
    with pytest.raises(RecordError) as caught:
        question_of(given)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("question", "num_images", "placed"),
    [
        ("Why?", 0, "Why?"),
        ("Why?", 3, "Why?"),
        ("<image>\nWhy?", 1, "Why?"),
        ("<image> <image>\n Why?", 2, "Why?"),
        ("Why?\n<image>", 1, "Why?"),
        ("Is <image> so?", 1, "Is <image> so?"),
        ("<image> or <image>?", 2, "<image> or <image>?"),
        ("Which?\n<image>\n<image>", 2, "Which?\n<image>\n<image>"),
    ],
)
def test_marks_are_as_many_as_pictures_or_none(question: str, num_images: int, placed: str):
    assert with_pictures_placed(question, num_images) == placed
    assert prompt_parts(placed, num_images).count(None) == num_images


@pytest.mark.parametrize(
    ("question", "num_images", "reason"),
    [
        ("<image>\nWhy?", 0, "image_mark_mismatch"),
        ("<image><image> Why?", 1, "image_mark_mismatch"),
        ("In <image>?", 2, "image_mark_mismatch"),
        ("<image>", 1, "empty_question"),
        ("<image>\n <image>", 2, "empty_question"),
        ("<image>\u200b\n\u00a0\x00", 1, "empty_question"),
        ("Is <ima<image>ge> a tag?", 1, "image_mark_mismatch"),
        ("<|vision_start|><|image_pad|><|vision_end|>", 1, "empty_question"),
        ("[IMG]\n", 1, "empty_question"),
    ],
)
def test_a_mark_without_its_picture_is_rejected(question: str, num_images: int, reason: str):
    with pytest.raises(RecordError) as caught:
        with_pictures_placed(question, num_images)
    assert caught.value.reason == reason
    if reason == "image_mark_mismatch":
        assert f"{question.count('<image>')} <image>" in caught.value.detail
        assert f"{num_images} pictures" in caught.value.detail


def test_a_tag_with_an_end_is_no_mark():
    """It was asked as a picture, with the tag's end as text behind it."""
    with pytest.raises(RecordError, match="</image>"):
        with_pictures_placed("Is <image>a.png</image> right?", 1)
    assert with_pictures_placed("(<image>./</image>)\nWhy?", 1) == "Why?"
    assert with_pictures_placed("Is (<image>./</image>) so?", 1) == "Is <image> so?"


@pytest.mark.parametrize(
    ("question", "mark"),
    [
        *[(f"{mark} Why?", mark) for mark in ("<ImageHere>", "<Image>", "<image 1>", "<image_2>")],
        *[(f"{mark} Why?", mark) for mark in ("<|image_pad|>", "<|image_1|>", "[IMG]", "<img>")],
        ("Is <image> so?", ""),
        ("Is [1] an <images> tag, or <imagine>?", ""),
    ],
)
def test_marks_of_other_tools_are_known(question: str, mark: str):
    assert foreign_mark(question) == mark


@pytest.mark.parametrize(
    ("question", "num_images", "parts"),
    [
        ("Why?", 2, [None, None, "Why?"]),
        ("Why?", 0, ["Why?"]),
        ("Is <image> so?", 1, ["Is ", None, " so?"]),
        ("<image> or <image>?", 2, [None, " or ", None, "?"]),
        ("Which?\n<image>\n<image>", 2, ["Which?\n", None, "\n", None]),
        ("One <image> of two", 2, [None, None, "One  of two"]),
    ],
)
def test_the_parts_of_a_prompt(question: str, num_images: int, parts: list):
    assert prompt_parts(question, num_images) == parts
