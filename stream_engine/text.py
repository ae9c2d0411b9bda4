"""Words for people: times, errors. Knows nothing but the standard library."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """A time in its two largest units: `1h 05m`, `2m 10s`, `12s`."""
    whole = max(0, round(seconds))
    if whole >= 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole}s"


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """What an error of a foreign package says, in one line that is cut when it is long."""
    return " ".join(str(error).split())[:limit]


def describe(error: BaseException) -> str:
    """An error in one line, with its type where the message alone would not tell."""
    text = " ".join(str(error).split())
    known = type(error).__module__.startswith("stream_engine")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def nearest(name: str, known: Sequence[str]) -> str:
    """`'; did you mean ...?'` for the closest known name, or an empty string.

    Case does not count, nor whether words are joined by dashes or underscores.
    """
    simple = {one.lower().replace("-", "_"): one for one in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), simple, n=1)
    return f"; did you mean {simple[close[0]]!r}?" if close else ""


MAX_LINE = 4000
"""Characters of a line that is shown."""


def printable(value: object, *, limit: int = MAX_LINE) -> str:
    """Text with foreign parts (ids, paths, names of columns) as it may be shown: on one line,
    without terminal controls, cut when it is long."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
