"""A question with its pictures as the formats write it.

A question may hold a literal `<image>`. Marks that stand inside the text, one for each image, stay
where they are; else the images come first, as every trainer puts them, and marks are taken out.
"""

from __future__ import annotations

from stream_engine.records import IMAGE_MARK, Sample, without_marks


def question_parts(sample: Sample) -> list[str | None]:
    """The user's turn in order: texts, and None where an image stands."""
    front: list[str | None] = [None] * len(sample.images)
    return inline_parts(sample) or [*front, without_marks(sample.question)]


def marked_question(sample: Sample) -> str:
    """The user's turn with one mark an image."""
    parts = question_parts(sample)
    return "".join(IMAGE_MARK if part is None else part for part in parts)


def inline_parts(sample: Sample) -> list[str | None] | None:
    """The parts of a question with a mark inside its text for each image; None for any other.

    Marks in front of the whole text, or one mark behind it, are the plain form: images first.
    """
    texts = sample.question.split(IMAGE_MARK)
    num_marks = len(texts) - 1
    is_in_front = not any(map(str.strip, texts[:-1]))
    is_plain = is_in_front or (num_marks == 1 and not texts[1].strip())
    if num_marks != len(sample.images) or is_plain:
        return None
    parts = [part for text in texts for part in (text, None)][:-1]
    return [part for part in parts if part != ""]
