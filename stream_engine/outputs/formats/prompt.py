"""A question with its pictures as the formats write it: as the model was asked it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from stream_engine.outputs.formats.base import PairRow
from stream_engine.records import IMAGE_MARK, MEDIA_MARKS, Sample, prompt_parts


def question_parts(sample: Sample) -> list[str | None]:
    """The user's turn in order: texts, and None where an image stands."""
    return prompt_parts(sample.question, len(sample.images))


def marked_question(sample: Sample) -> str:
    """The user's turn with one mark an image."""
    return "".join(IMAGE_MARK if part is None else part for part in question_parts(sample))


def has_media_mark(row: PairRow, marks: Collection[str] = MEDIA_MARKS) -> bool:
    """Whether one of the row's texts spells a mark by which a trainer puts something else there."""
    return any(mark in text for mark in marks for text in texts_of(row))


def texts_of(row: PairRow) -> tuple[str, str, str]:
    """Question, chosen and rejected answer."""
    return row.sample.question, row.chosen.text, row.rejected.text


def embedded_images(sample: Sample) -> list[dict[str, Any]]:
    """The pictures as values of an image column."""
    return [{"bytes": image.data, "path": image.path} for image in sample.images]
