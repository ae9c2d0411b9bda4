"""Cells of foreign tables: missing ones, and what becomes text. Knows no column."""

from __future__ import annotations

import ast
import json
import math
import warnings
from typing import Any

from stream_engine.errors import RecordError


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: absent, null, or the NaN that pandas writes for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


MAX_WRITTEN = 1 << 24
"""Characters of a list or dict as Python writes it, beyond which it stays text."""


def as_list(value: Any) -> Any:
    """The list that a cell holds as text, since csv has no lists; any other value as it is."""
    return from_text(value, "[]")


def from_text(value: Any, brackets: str) -> Any:
    """What a text in these brackets says, as JSON or as Python (so pandas) writes lists and dicts;
    any other value as it is."""
    if not isinstance(value, str) or (value.strip()[:1] + value.strip()[-1:]) != brackets:
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    if len(value) > MAX_WRITTEN:
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that mean nothing
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value


def as_records(value: Any) -> Any:
    """The list of dicts that a dict of lists of one length is, as `datasets` stores sequences of
    dicts; any other value as it is."""
    if not isinstance(value, dict) or not all(isinstance(cell, list) for cell in value.values()):
        return value
    if len({len(cell) for cell in value.values()}) != 1:
        return value
    return [dict(zip(value, cells)) for cells in zip(*value.values())]


def as_text(value: Any, name: str) -> str:
    """A cell that must be text, or bytes of UTF-8.

    Raises:
        RecordError: ("invalid_text", "invalid_<name>") for anything else.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError as error:
            raise RecordError("invalid_text", f"{name}: {error}") from error
    if not isinstance(value, str):
        raise RecordError(f"invalid_{name}", f"{type(value).__name__} instead of text")
    check_unicode(value, name)
    return value


def text_of(value: Any, name: str = "") -> str:
    """Text as it is, nothing as "", dicts, lists and numbers as JSON.

    Raises:
        RecordError: "invalid_text" for what no file can hold as text.
    """
    if is_missing(value):
        return ""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return as_text(value, name)
    if isinstance(value, (dict, list, bool, int, float)):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, RecursionError) as error:  # an integer of 5000 digits, deep lists
            raise RecordError("invalid_text", f"{name}: {error}") from error
    value = str(value)
    check_unicode(value, name)
    return value


def check_unicode(text: str, name: str) -> None:
    """Refuse half surrogate pairs, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError("invalid_text", f"{name}: {error}") from error
