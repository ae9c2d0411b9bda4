"""The question of a row as it will be asked, and where its pictures stand in it."""

from __future__ import annotations

import re
from typing import Any

from stream_engine.errors import RecordError
from stream_engine.inputs.cells import as_text, is_missing
from stream_engine.records import IMAGE_MARK, marks_are_in_front, without_marks

FOREIGN_MARK = "foreign_mark"
FOREIGN = re.compile(
    r"<\s*image\s*/?>|<image[ _-]?(\d+|placeholder|token|soft_token)>|\[IMG\]"
    r"|</?(ImageHere|IMG_CONTEXT|start_of_image|im_patch|img)>"
    r"|<\|(image(_pad|_\d+)?|(begin|end)_of_image|vision_(start|end))\|?>",
    re.IGNORECASE,
)
"""How other tools and models mark pictures."""
OPEN_MARK = f"({IMAGE_MARK}./</image>)"
"""MiniCPM-V's way to write a mark."""
END_OF_TAG = "</image>"


def foreign_mark(question: str) -> str:
    """The first mark of a picture in another tool's writing, or ""; it is asked as text."""
    found = FOREIGN.search(question.replace(IMAGE_MARK, ""))
    return found[0] if found else ""


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
    question = question.replace(OPEN_MARK, IMAGE_MARK)
    num_marks = question.count(IMAGE_MARK)
    plain = without_marks(question)
    if num_marks and END_OF_TAG in question:
        raise RecordError(
            "image_mark_mismatch",
            f"{IMAGE_MARK} and {END_OF_TAG} in the question: a tag, and no mark of a picture",
        )
    if num_marks and (num_marks != num_images or IMAGE_MARK in plain):
        within = ", one within another" if IMAGE_MARK in plain else ""
        raise RecordError(
            "image_mark_mismatch",
            f"{num_marks} {IMAGE_MARK} in the question{within}, {num_images} pictures in the row",
        )
    if not shows(FOREIGN.sub("", plain)):
        raise RecordError("empty_question", f"nothing but {question.strip()[:50]} is asked")
    return plain if num_marks and marks_are_in_front(question) else question
