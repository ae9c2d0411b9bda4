"""JSON lines, and JSON files of any size, as rows with their numbers.

A list is read one element at a time. (ijson was tried for it: it replaces half surrogates, stops at
NaN, and its memory grows with the depth.)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from stream_engine.errors import RecordError
from stream_engine.inputs.layouts import Row, looks_like_turn
from stream_engine.inputs.rows import KNOWN_COLUMNS
from stream_engine.inputs.unread import Unreadable

CHUNK_BYTES = 1 << 20
MAX_ELEMENT = 1 << 30
"""Characters of one element of a list, beyond which the file is taken to be broken."""
WHITE = " \t\n\r"


def jsonl_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RecordError]]:
    """The lines of a jsonl file; blank lines are passed over but counted."""
    for position, line in enumerate(stream):
        if position == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield position, parse_json(line)


def parse_json(text: bytes | str) -> Row | RecordError:
    """A JSON object, or the error that says why it is none. NaN is read as pandas writes it."""
    try:
        return as_row(json.loads(text, object_pairs_hook=as_object))
    except UnicodeDecodeError as error:
        return RecordError("invalid_text", str(error))
    except (ValueError, RecursionError) as error:
        return RecordError("malformed_json", str(error))


class Doubled(dict[str, Any]):
    """An object that gives a name two values, of which the last is kept."""


def as_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its names and values, which remembers whether some were lost."""
    content = dict(pairs)
    is_whole = len(content) == len(pairs) or all(content[name] == v for name, v in pairs)
    return content if is_whole else Doubled(content)


def as_row(value: Any) -> Row | RecordError:
    if isinstance(value, Doubled):
        return RecordError("doubled_column", "a name stands twice in the row, with two values")
    if isinstance(value, dict):
        orient = orient_of(value)
        return RecordError("malformed_json", NOT_ROWS.format(orient)) if orient else value
    return RecordError("malformed_json", f"{type(value).__name__} instead of an object")


NOT_ROWS = (
    'a whole table as pandas writes it by orient="{}", not a row: write it by '
    'to_json(..., orient="records", lines=True)'
)


def orient_of(value: dict[str, Any]) -> str:
    """pandas' name for the way in which an object holds a table; "" for a row.

    split    {"columns": [name, ...], "index": [...], "data": [[cell, ...], ...]}
    columns  {name: {label: cell, ...}, ...}
    index    {label: {name: cell, ...}, ...}
    """
    if value.keys() - {"index"} == {"columns", "data"}:
        return "split" if all(isinstance(part, list) for part in value.values()) else ""
    parts = list(value.values())
    if len(parts) < 2 or not all(isinstance(part, dict) for part in parts):
        return ""
    names = parts[0].keys()
    if any(part.keys() != names for part in parts) or looks_like_turn(parts[0]):
        return ""
    return "columns" if names.isdisjoint(KNOWN_COLUMNS) else "index"


def json_rows(stream: BinaryIO) -> Iterator[tuple[int, Row | RecordError]]:
    """The elements of a JSON list, or of several that follow each other, or the objects of a file.

    A file that is one object around a single list of objects ({"data": [...]}) is that list.
    """
    text = TextWindow(stream)
    if text.peek() == "[":
        yield from enumerate(text.lists())
        return
    values = text.values()
    first = next(values, None)
    if first is None:
        return
    inner = None if isinstance(first, RecordError) else inner_list(first)
    rest = next(values, None)
    if inner is not None and rest is None:
        yield from enumerate(map(as_row, inner))
        return
    yield 0, first
    if rest is not None:
        yield 1, rest
        yield from enumerate(values, start=2)


def inner_list(row: Row) -> list[Any] | None:
    """The one list of objects in an object that is no row itself."""
    lists = [v for v in row.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    names = ("question", "conversations", "messages", "prompt")
    is_row = any(name in row for name in names)
    return lists[0] if len(lists) == 1 and not is_row else None


class TextWindow:
    """The text of a stream, read on as it is needed; what was parsed is dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self.parser = json.JSONDecoder(object_pairs_hook=as_object)
        self.text = ""
        self.start = 0
        self.at_end = False

    def more(self) -> bool:
        """Read on; False at the end."""
        if self.at_end:
            return False
        data = self.stream.read(CHUNK_BYTES)
        self.at_end = not data
        added = self.decoder.decode(data, final=self.at_end)
        self.text = self.text[self.start :] + added
        self.start = 0
        return True

    def peek(self) -> str:
        """The next character that is not white, or "" at the end."""
        while True:
            while self.start < len(self.text) and self.text[self.start] in WHITE:
                self.start += 1
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.more():
                return ""

    def skip(self, count: int) -> None:
        self.start += count

    def lists(self) -> Iterator[Row | RecordError]:
        """The elements of one list after the other, to the end of the file."""
        while mark := self.peek():
            if mark != "[":
                raise Unreadable(f"{mark!r} behind the end of a list")
            self.skip(1)
            yield from self.elements()

    def elements(self) -> Iterator[Row | RecordError]:
        """What follows the "[" of a list."""
        if self.peek() == "]":
            self.skip(1)
            return
        while True:
            if not self.peek():
                raise Unreadable("the list has no end: the file is cut")
            yield self.value()
            mark = self.peek()
            self.skip(1)
            if mark == "]":
                return
            if mark != ",":
                raise Unreadable(
                    f"{mark!r} instead of a comma between two elements"
                    if mark
                    else "the list has no end: the file is cut"
                )

    def values(self) -> Iterator[Row | RecordError]:
        """Values one after the other, to the end of the file."""
        while self.peek():
            yield self.value()

    def value(self) -> Row | RecordError:
        """The next value; one that no parser takes is passed over by its brackets."""
        while True:
            try:
                value, end = self.parser.raw_decode(self.text, self.start)
            except RecursionError as error:
                return self.skipped(str(error))
            except ValueError as error:
                if len(self.text) - self.start < MAX_ELEMENT and self.is_unfinished():
                    continue
                return self.skipped(str(error))
            if end < len(self.text) or not self.more():  # a number may go on
                self.start = end
                return as_row(value)

    def is_unfinished(self) -> bool:
        """Whether the value's brackets are still open; reads on then."""
        return self.end_of_value() is None and self.more()

    def skipped(self, detail: str) -> RecordError:
        """Pass over a value that cannot be parsed.

        Raises:
            Unreadable: when its end cannot be found.
        """
        while (end := self.end_of_value()) is None:
            if not self.more():
                raise Unreadable(f"cut within a value: {detail}")
        self.start = end
        return RecordError("malformed_json", detail)

    def end_of_value(self) -> int | None:
        """Where the value ends that begins here, by counting brackets; None when it is open."""
        depth, position = 0, self.start
        while position < len(self.text):
            letter = self.text[position]
            if letter == '"':
                position = end_of_string(self.text, position)
                if position < 0:
                    return None
                continue
            if letter in "[{":
                depth += 1
            elif letter in "]}":
                depth -= 1
                if depth <= 0:
                    return position + (depth == 0)
            elif letter == "," and depth == 0:
                return position
            position += 1
        return None


def end_of_string(text: str, start: int) -> int:
    """Behind the closing quote of a string that begins at `start`; -1 when it is open."""
    position = start + 1
    while (quote := text.find('"', position)) >= 0:
        backslashes = 0
        while text[quote - 1 - backslashes] == "\\":
            backslashes += 1
        if backslashes % 2 == 0:
            return quote + 1
        position = quote + 1
    return -1
