"""The question of a row as it will be asked, and where its pictures stand in it."""

from __future__ import annotations

from typing import Any

from stream_engine.errors import RecordError
from stream_engine.inputs.cells import as_text, is_missing
from stream_engine.records import IMAGE_MARK, marks_are_in_front, without_marks


def question_of(value: Any) -> str:
    """A row's question: text with something in it, without what editors leave at its ends.

    A byte order mark goes, line ends become "\\n" and those at the end go; other white space stays.

    Raises:
        RecordError: missing_question, invalid_question, invalid_text or empty_question.
    """
    if is_missing(value):
        raise RecordError("missing_question")
    question = as_text(value, "question").removeprefix("\ufeff")
    question = question.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    if not shows(question):
        raise RecordError("empty_question")
    return question


def shows(text: str) -> bool:
    """Whether a text has a letter that is seen: zero-width ones and controls are none."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def with_pictures_placed(question: str, num_images: int) -> str:
    """A question whose image marks are as many as its pictures, or none: then they come first.

    Marks that stand inside the text stay. Marks in front of all text, or one behind it, mean
    "pictures first" as well, and are taken out.

    Raises:
        RecordError: image_mark_mismatch, or empty_question when nothing but marks is asked.
    """
    num_marks = question.count(IMAGE_MARK)
    if num_marks == 0:
        return question
    plain = without_marks(question)
    if num_marks != num_images or IMAGE_MARK in plain:
        within = ", one within another" if IMAGE_MARK in plain else ""
        raise RecordError(
            "image_mark_mismatch",
            f"{num_marks} {IMAGE_MARK} in the question{within}, {num_images} pictures in the row",
        )
    if not shows(plain):
        raise RecordError("empty_question", f"nothing but {IMAGE_MARK} is asked")
    return plain if marks_are_in_front(question) else question
