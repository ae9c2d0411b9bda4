"""Foreign layouts of a row -> our column names.

    --columns question=query,image=img      a mapping that the user gives
    conversations                           LLaVA and ShareGPT: [{"from": "human", "value": ...}]
    messages, prompt                        chat turns: [{"role": "user", "content": ...}], TRL's

What is asked is the first turn of the user, alone. A turn before it (a system prompt) would be
lost, so such a row is rejected; later turns are left out, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_engine.errors import RecordError
from stream_engine.inputs.cells import as_list, is_missing
from stream_engine.records import IMAGE_MARK

Row = dict[str, Any]

CHAT_COLUMNS = ("conversations", "messages", "prompt")
"""Read in this order where a row has no question."""
PICTURE_COLUMNS = ("image", "images")
HIDDEN_BY = (
    (PICTURE_COLUMNS, PICTURE_COLUMNS),
    (CHAT_COLUMNS, ("question",)),
)
"""Where --columns names one of the first, the second are not asked, as they would be else."""
USERS = frozenset(("user", "human"))
LATER_TURNS = "later_turns"
PICTURE_KEYS = ("image", "image_url", "url", "path", "bytes", "source")
"""Where a content part of type image keeps its picture, if it brings one."""


def with_question(row: Row, *, pairs: bool = False) -> tuple[Row, list[str]]:
    """A row with the question that a chat column asks, and notes on what of that is left out.

    With `pairs`, `chosen` may be the whole conversation, where no other column asks.

    Raises:
        RecordError: turns_before_question, unknown_turns or unsupported_content.
    """
    if not is_missing(row.get("question")):
        return row, []
    for name in (*CHAT_COLUMNS, "chosen") if pairs else CHAT_COLUMNS:
        turns = row.get(name)
        if isinstance(turns, str) and name == "prompt":
            return {**row, "question": turns}, []
        turns = as_list(turns)
        if isinstance(turns, list) and turns:
            question, pictures, notes = first_question(turns, name)
            row = {**row, "question": question}
            if pictures:
                row |= {"images": pictures, "image": row.get("images") or row.get("image")}
            return row, notes
    return row, []


def mapped(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with the user's columns under our names; what these hid is gone."""
    if not columns:
        return row
    hidden = set(columns.values())
    for named, others in HIDDEN_BY:
        hidden |= set() if columns.keys().isdisjoint(named) else set(others)
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {ours: row.get(theirs) for ours, theirs in columns.items()}


def first_question(turns: list[Any], column: str) -> tuple[str, list[Any], list[str]]:
    """The first turn of the user: its text with marks, the pictures it brings, and notes."""
    said = [turn_of(turn, column) for turn in turns]
    number = next((i for i, (who, _) in enumerate(said) if who in USERS), None)
    if number is None:
        raise RecordError("unknown_turns", f"{column} has no turn of a user")
    before = [(who, content) for who, content in said[:number] if content not in (None, "", [])]
    if before:
        raise RecordError(
            "turns_before_question",
            f"{column} begins with a turn of {before[0][0]!r}; questions are asked alone, "
            "without system prompts and earlier turns",
        )
    text, pictures = content_of(said[number][1], column)
    has_more = any(who in USERS for who, _ in said[number + 1 :])
    if has_more and column == "prompt":  # whose last turn is the one that is answered
        raise RecordError("turns_before_question", f"{column} holds several turns of the user")
    return text, pictures, [LATER_TURNS] if has_more else []


def turn_of(turn: Any, column: str) -> tuple[str, Any]:
    """Who speaks, and what is said."""
    if isinstance(turn, dict):
        for who, what in (("from", "value"), ("role", "content")):
            if isinstance(turn.get(who), str):
                return turn[who].lower(), turn.get(what)
    raise RecordError("unknown_turns", f"{column} holds a {type(turn).__name__} that is no turn")


def content_of(content: Any, column: str) -> tuple[str, list[Any]]:
    """The text of a turn with a mark for each picture, and the pictures that its parts bring."""
    if isinstance(content, (str, bytes)) or content is None:
        return content, []  # type: ignore[return-value]  # checked with all other questions
    if not isinstance(content, list):
        raise RecordError("unsupported_content", f"{column}: {type(content).__name__}")
    words: list[str] = []
    pictures: list[Any] = []
    for part in content:
        if isinstance(part, str):
            words.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in ("image", "image_url"):
            words.append(IMAGE_MARK)
            pictures += [part[name] for name in PICTURE_KEYS if not is_missing(part.get(name))][:1]
        else:
            raise RecordError("unsupported_content", f"{column} has a part of type {kind!r}")
    return "".join(words), pictures
