"""Two texts word by word: what they share, and what only one of them has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from stream_engine.pipelines.ranking import UNSPACED

UNIT = re.compile(rf"\s+|[{UNSPACED}]|\w+|[^\w\s]")
"""A word, a run of white space or a mark; the units put together are the text."""
MAX_PRODUCT = 4_000_000
"""Units of one text times those of the other, up to which they are aligned; beyond, only what the
texts share at their ends counts as shared. The alignment takes time by that product."""

Segment = tuple[bool, str]
"""Whether only this text has it, and the text."""
Segments = list[Segment]


def difference(first: str, second: str) -> tuple[Segments, Segments]:
    """Both texts in segments, alternately shared and their own."""
    units = UNIT.findall(first), UNIT.findall(second)
    if len(units[0]) * len(units[1]) > MAX_PRODUCT:
        return by_their_ends(*units)
    found: tuple[Segments, Segments] = ([], [])
    matcher = SequenceMatcher(None, *units, autojunk=False)
    blocks = matcher.get_opcodes()
    for number, (kind, begin, end, begin_second, end_second) in enumerate(blocks):
        spans = units[0][begin:end], units[1][begin_second:end_second]
        is_gap = 0 < number < len(blocks) - 1 and "".join(spans[0]).isspace()
        for segments, span in zip(found, spans):  # white space between own words is their own
            add(segments, kind != "equal" or is_gap, "".join(span))
    return found


def by_their_ends(first: Sequence[str], second: Sequence[str]) -> tuple[Segments, Segments]:
    """The same, with nothing shared but a beginning and an end."""
    shorter = min(len(first), len(second))
    head = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    rest = shorter - head
    tail = next((i for i in range(rest) if first[-1 - i] != second[-1 - i]), rest)
    found: tuple[Segments, Segments] = ([], [])
    for segments, units in zip(found, (first, second)):
        add(segments, False, "".join(units[:head]))
        add(segments, True, "".join(units[head : len(units) - tail]))
        add(segments, False, "".join(units[len(units) - tail :]))
    return found


def add(segments: list[Segment], is_own: bool, text: str) -> None:
    """Append a segment; to the last one where that is of its kind."""
    if segments and segments[-1][0] == is_own:
        text = segments.pop()[1] + text
    if text:
        segments.append((is_own, text))
