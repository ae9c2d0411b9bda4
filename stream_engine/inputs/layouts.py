"""Foreign layouts of a row -> our column names.

    --columns question=query,image=img      a mapping that the user gives
    conversations                           LLaVA and ShareGPT: [{"from": "human", "value": ...}]
    messages, prompt                        chat turns: [{"role": "user", "content": ...}], TRL's

What is asked is the first turn of the user, alone. A turn before it (a system prompt) would be
lost, so such a row is rejected; later turns are left out, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stream_engine.errors import RecordError
from stream_engine.inputs.cells import as_list, as_records, from_text, is_missing
from stream_engine.inputs.picture_values import pictures_in
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
CONTEXT_COLUMNS = ("system", "history")
"""What would be said before a question; where a row has them, it is not asked alone."""
USERS = frozenset(("user", "human", "prompter"))
LATER_TURNS = "later_turns"
TURN_NAMES = ({"from", "value"}, {"role", "content"})
PICTURE_KEYS = ("image", "image_url", "url", "path", "bytes", "source")
"""Where a content part of type image keeps its picture, if it brings one."""
TEXT_PARTS = frozenset(("text", "input_text"))
PICTURE_PARTS = frozenset(("image", "image_url", "input_image"))


class Turn(NamedTuple):
    """Who speaks, what is said, and the pictures that stand beside it in the turn."""

    who: str
    content: Any
    pictures: list[Any]


def with_question(row: Row, *, pairs: bool = False) -> tuple[Row, list[str]]:
    """A row with the question that a chat column asks, and notes on what of that is left out.

    With `pairs`, `chosen` may be the whole conversation, where no other column asks.

    Raises:
        RecordError: turns_before_question, unknown_turns, unsupported_content or
            image_mark_mismatch.
    """
    refuse_context(row, "history")
    if not is_missing(row.get("question")):
        return row, []
    unknown = ""
    for name in (*CHAT_COLUMNS, "chosen") if pairs else CHAT_COLUMNS:
        turns = turns_in(row.get(name))
        if isinstance(turns, str) and name == "prompt":
            return {**row, "question": turns}, []
        if isinstance(turns, list) and turns:
            refuse_context(row, "system")
            question, pictures, notes = first_question(turns, name)
            row = {**row, "question": question}
            if pictures:
                row |= {"images": pictures, "image": row.get("images") or row.get("image")}
            return row, notes
        if turns and name != "chosen" and not is_missing(turns):
            unknown = unknown or f"{name} is no list of turns, but {type(turns).__name__}"
    if unknown:
        raise RecordError("unknown_turns", unknown)
    return row, []


def turns_in(value: Any) -> Any:
    """A conversation's turns as a list, where the cell holds them in some way; else the cell."""
    turns = as_records(from_text(as_list(value), "{}"))
    if looks_like_turn(turns):
        return [turns]
    is_list = isinstance(turns, list) and turns and all(map(looks_like_turn, turns))
    return value if isinstance(value, str) and not is_list else turns  # "[1, 2], what follows?"


def looks_like_turn(value: Any) -> bool:
    """Whether a dict says who speaks and what."""
    return isinstance(value, dict) and any(names <= value.keys() for names in TURN_NAMES)


def refuse_context(row: Row, column: str) -> None:
    """Raise RecordError for a row with a system prompt or earlier turns in a column of its own."""
    value = as_list(row.get(column))
    if not is_blank(value) if column == "system" else isinstance(value, list) and value:
        raise RecordError(
            "turns_before_question",
            f"the row has a {column} of its own; questions are asked alone, without system "
            "prompts and earlier turns",
        )


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
    number = next((i for i, turn in enumerate(said) if turn.who in USERS), None)
    if number is None:
        speakers = ", ".join(dict.fromkeys(repr(turn.who) for turn in said))
        raise RecordError("unknown_turns", f"{column} has no turn of a user, but of {speakers}")
    if before := [turn for turn in said[:number] if not is_blank(turn.content) or turn.pictures]:
        raise RecordError(
            "turns_before_question",
            f"{column} begins with a turn of {before[0].who!r}; questions are asked alone, "
            "without system prompts and earlier turns",
        )
    text, pictures = content_of(said[number].content, column)
    later = [turn for turn in said[number + 1 :] if turn.who in USERS]
    if later and column == "prompt":  # whose last turn is the one that is answered
        raise RecordError("turns_before_question", f"{column} holds several turns of the user")
    if IMAGE_MARK not in (text or "") and (num_marks := sum(open_marks(t, column) for t in later)):
        raise RecordError(
            "image_mark_mismatch",
            f"{num_marks} {IMAGE_MARK} in later turns of {column}, and none in the first, which "
            "is the one that is asked",
        )
    return text, pictures + said[number].pictures, [LATER_TURNS] if later else []


def open_marks(turn: Turn, column: str) -> int:
    """Marks in a turn for which it brings no picture itself."""
    text, pictures = content_of(turn.content, column)
    num_marks = text.count(IMAGE_MARK) if isinstance(text, str) else 0
    return max(0, num_marks - len(pictures) - len(turn.pictures))


def is_blank(content: Any) -> bool:
    """Whether nothing is said: no text, white space, or parts of such."""
    if isinstance(content, list):
        return all(isinstance(p, dict) and p.get("type") == "text" for p in content) and all(
            is_blank(part.get("text")) for part in content
        )
    return is_missing(content) or (isinstance(content, str) and not content.strip())


def turn_of(turn: Any, column: str) -> Turn:
    """One turn, in any of the ways to write it."""
    if isinstance(turn, dict):
        for who, *names in (("from", "value", "content"), ("role", "content", "value")):
            if isinstance(turn.get(who), str):
                said = [turn[name] for name in names if name in turn]
                if not said:
                    raise RecordError(
                        "unknown_turns",
                        f"{column} has a turn of {turn[who]!r} without content or value; it has "
                        + ", ".join(map(repr, turn)),
                    )
                content = next((one for one in said if not is_missing(one)), None)
                pictures = pictures_in(turn.get("images")) or pictures_in(turn.get("image"))
                return Turn(turn[who].strip().lower(), content, pictures)
    raise RecordError("unknown_turns", f"{column} holds a {type(turn).__name__} that is no turn")


def content_of(content: Any, column: str) -> tuple[str, list[Any]]:
    """The text of a turn with a mark for each picture, and the pictures that its parts bring."""
    if isinstance(content, (str, bytes)) or content is None:
        return content, []  # type: ignore[return-value]  # checked with all other questions
    content = as_records(content)
    if not isinstance(content, list):
        raise RecordError("unsupported_content", f"{column}: {type(content).__name__}")
    words: list[str] = []
    pictures: list[Any] = []
    for part in content:
        if isinstance(part, str):
            words.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in PICTURE_PARTS:
            words.append(IMAGE_MARK)
            pictures += [part[name] for name in PICTURE_KEYS if not is_missing(part.get(name))][:1]
        else:
            raise RecordError("unsupported_content", f"{column} has a part of type {kind!r}")
    return "".join(words), pictures
