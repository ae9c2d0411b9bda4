"""Answers that a row brings along: they are scored, and none is sampled.

    answers                      texts, or {"text", "model", "finish_reason"}; as JSON text in csv
    chosen, rejected             a pair that is made already (--given_answers pairs): texts, lists
                                 of texts, turns ({"role", "content"} or {"from", "value"}), or the
                                 conversation that ends with the answer; models from chosen_model
                                 and rejected_model
    messages, rejected_response  the same as ms-swift writes it; also messages, rejected_messages

A row that has none of these, or null, has no answers. What cannot be read rejects its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.cells import as_list, as_text, is_missing, text_of
from stream_engine.inputs.layouts import USERS, Row, Turn, content_of, turn_of, turns_in
from stream_engine.records import IMAGE_MARK, GivenAnswer
from stream_engine.text import reading

REJECTED_COLUMNS = ("rejected", "rejected_response", "rejected_messages")
"""The later ones stand beside `messages`, which then end with the chosen answer."""
ANSWER_COLUMNS = ("answers", "chosen", *REJECTED_COLUMNS, "chosen_model", "rejected_model")
MAX_ANSWERS = 256
"""Of one question: their scores are held together, and a critic compares each with each."""
ASSISTANTS = frozenset(("assistant", "gpt", "model"))

WITH_ANSWERS = "with_answers"
ONE_ANSWER = "one_answer"
UNREAD_PAIR = "unread_pair"


def answers_of(row: Row, config: InputConfig, notes: list[str]) -> tuple[GivenAnswer, ...]:
    """The answers of a row, in order; () where they are to be sampled. Notes get what to tell.

    Raises:
        RecordError: no_answers, too_many_answers, invalid_answers, invalid_answer, invalid_text,
            incomplete_pair, different_questions, unknown_turns, turns_before_question or
            unsupported_content.
    """
    if config.given_answers == "ignore":
        return ()
    if not is_missing(row.get("answers")):
        found = listed(row["answers"])
    elif config.given_answers == "pairs":
        found = paired(row)
    else:
        found = ()
        notes += [UNREAD_PAIR] if all(not is_missing(side) for side in sides_of(row)) else []
    if len(found) > MAX_ANSWERS:
        raise RecordError("too_many_answers", f"{len(found)} answers, at most {MAX_ANSWERS} count")
    if found:
        notes += [WITH_ANSWERS, *([ONE_ANSWER] if is_one([one.text for one in found]) else [])]
    return found


def is_one(texts: Iterable[str]) -> bool:
    """Whether these are one text to a reader."""
    return len(set(map(reading, texts))) == 1


def listed(value: Any) -> tuple[GivenAnswer, ...]:
    """The column `answers`."""
    value = as_list(value)
    if not isinstance(value, list):
        what = "other text" if isinstance(value, str) else type(value).__name__
        raise RecordError("invalid_answers", f"{what} instead of a list")
    if not value:
        raise RecordError("no_answers", "an empty list; null, or no column, has answers sampled")
    return tuple(answer_of(one, number) for number, one in enumerate(value))


def answer_of(value: Any, number: int) -> GivenAnswer:
    """One of a list of answers."""
    if not isinstance(value, dict):
        return GivenAnswer(text=text_in(value, f"answer {number}"))
    if "text" not in value:
        raise RecordError("invalid_answer", f"answer {number} is a dict without `text`")
    said = {
        "text": text_in(value["text"], f"answer {number}"),
        "model": text_of(value.get("model"), "model"),
        "given_as": value.get("given_as") or "",
        "finish_reason": value.get("finish_reason") or "stop",
    }
    try:
        return msgspec.convert(said, GivenAnswer)
    except msgspec.ValidationError as error:
        raise RecordError("invalid_answer", f"answer {number}: {error}") from error


def text_in(value: Any, name: str) -> str:
    """An answer's text."""
    try:
        return as_text(value, name)
    except RecordError as error:
        reason = "invalid_text" if error.reason == "invalid_text" else "invalid_answer"
        raise RecordError(reason, f"{name}: {error.detail}") from error


def paired(row: Row) -> tuple[GivenAnswer, ...]:
    """The answers of a pair, the chosen one first."""
    chosen, rejected = sides_of(row)
    if is_missing(chosen) and is_missing(rejected):
        return ()
    if is_missing(chosen) or is_missing(rejected):
        has, lacks = ("chosen", "rejected") if is_missing(rejected) else ("rejected", "chosen")
        raise RecordError("incomplete_pair", f"the row has {has}, but no {lacks}")
    asked = [text for text in map(question_in, (chosen, rejected)) if text is not None]
    if len(asked) == 2 and not is_one(asked):
        raise RecordError("different_questions", "chosen and rejected answer different questions")
    own = row.get("question")
    if asked and isinstance(own, str) and not is_one([*asked, own.replace(IMAGE_MARK, "")]):
        raise RecordError("different_questions", "chosen answers another question than the row's")
    return (*side_of(chosen, "chosen", row), *side_of(rejected, "rejected", row))


def sides_of(row: Row) -> tuple[Any, Any]:
    """What a row has for chosen and rejected: these columns, or what stands for them."""
    chosen = row.get("chosen")
    name = next((one for one in REJECTED_COLUMNS if not is_missing(row.get(one))), "rejected")
    if name != "rejected" and is_missing(chosen):
        chosen = row.get("messages")
    return chosen, row.get(name)


def question_in(side: Any) -> str | None:
    """The question that a conversation of one question and its answer begins with."""
    side = turns_in(side)
    if not (isinstance(side, list) and len(side) == 2 and isinstance(side[0], dict)):
        return None
    text, _ = content_of(turn_of(side[0], "conversation").content, "conversation")
    return text.replace(IMAGE_MARK, "") if isinstance(text, str) else None


def side_of(value: Any, side: Literal["chosen", "rejected"], row: Row) -> Iterator[GivenAnswer]:
    """The answers of one side of a pair; mostly one."""
    model = text_of(row.get(f"{side}_model"), f"{side}_model")
    value = turns_in(value)
    texts = value if isinstance(value, list) and all(isinstance(t, str) for t in value) else [value]
    if not texts:
        raise RecordError("no_answers", f"{side} is an empty list")
    for text in texts:
        if isinstance(text, dict):
            text = [text]
        text = last_turn(text, side) if isinstance(text, list) else text_in(text, side)
        yield GivenAnswer(text=text, model=model, given_as=side)


def last_turn(turns: list[Any], side: str) -> str:
    """The assistant's turn that ends a conversation, which may have the question before it."""
    said = [turn_of(turn, side) for turn in turns]
    last = said[-1] if said else Turn("nobody", None, [])
    if last.who not in ASSISTANTS:
        raise RecordError("unknown_turns", f"{side} ends with a turn of {last.who!r}")
    if len(said) > 2 or (len(said) == 2 and said[0].who not in USERS):
        raise RecordError(
            "turns_before_question",
            f"{side} has {len(said)} turns; questions are asked alone, without system prompts and "
            "earlier turns",
        )
    text, pictures = content_of(last.content, side)
    if pictures or last.pictures or (not isinstance(last.content, str) and IMAGE_MARK in text):
        raise RecordError("unsupported_content", f"{side} holds a picture")
    return text_in(text, side)
