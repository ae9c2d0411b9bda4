"""What came of a trial: how commands ended, and what differs from the undisturbed outcome."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.faults.scenes import Facts, differences
from tests.faults.trial import Ended

BAD = ("lost", "doubled", "stuck", "hangs", "tracebacks", "unclear ends", "silent differences")
"""Counted beside `tried` and `recovered`.

lost, doubled        facts that the undisturbed outcome has are not there, or there are more
stuck                the same command, given again, does not come to the end that it should
unclear ends         exit status 1 without one line of ours, or a status that means nothing
silent differences   the same facts by name, with another content, and no command says so
"""
SHOWN = 6


class Verdict(NamedTuple):
    """A trial that is over."""

    fault: str
    command: str
    seed: int
    met: str
    """The change, or the file, at which harm was done; empty when it was not reached."""
    faults: tuple[str, ...]
    detail: str = ""


def faults_of_ends(ends: Iterable[Ended], *, killed: bool = False) -> list[str]:
    """What is wrong with how commands ended, whatever they left."""
    found: dict[str, None] = {}
    for ended in ends:
        if ended.status is None:
            found["hangs"] = None
        elif ended.has_traceback:
            found["tracebacks"] = None
        elif not (is_clear(ended) or (killed and ended.status == -9)):
            found["unclear ends"] = None
    return list(found)


def is_clear(ended: Ended) -> bool:
    """Whether an exit status is explained; 1 by a line of ours, or by what `status` prints."""
    is_explained = "stream-engine: " in ended.output or "samples: " in ended.output
    return ended.status in (0, 2) or (ended.status == 1 and is_explained)


def faults_of_facts(found: Facts, expected: Facts) -> list[str]:
    """What is wrong with what is there."""
    marks = {line[0] for line in differences(found, expected)}
    names = {"-": "lost", "+": "doubled", "~": "silent differences"}
    return [names[mark] for mark in "-+~" if mark in marks]


def detail_of(ends: Sequence[Ended], lines: Sequence[str]) -> str:
    """What a person needs to see of a bad trial."""
    parts = [f"  differs: {', '.join(lines[:SHOWN])}"] if lines else []
    for ended in ends:
        text = re.sub(r"(?m)^", "      ", ended.output[-3000:].rstrip())
        parts.append(f"  exit {ended.status}: {' '.join(ended.words[:2])}\n{text}")
    return "\n".join(parts)


def table(verdicts: Sequence[Verdict]) -> str:
    """Counts by kind of fault and command."""
    columns = ("tried", "recovered", *BAD)
    rows: dict[tuple[str, str], Counter[str]] = {}
    for verdict in verdicts:
        if not verdict.met:
            continue
        for key in ((verdict.fault, verdict.command), ("all", "")):
            row = rows.setdefault(key, Counter())
            row.update(["tried", *(verdict.faults or ["recovered"])])
    lines = [("fault", "command", *columns)]
    for (fault, command), row in sorted(rows.items(), key=lambda item: (item[0][0] == "all", item)):
        lines.append((fault, command, *(str(row[name]) for name in columns)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 2)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
