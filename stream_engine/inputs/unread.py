"""What of an input is not read, by name: columns, files, members of tars. Nothing goes unsaid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from stream_engine.inputs.rows import IMAGE_COLUMNS, KNOWN_COLUMNS
from stream_engine.text import printable

MAX_NAMES = 20
"""Names that are kept and told; the others are counted."""

MAX_NOTED = 1000
"""Columns that are looked at: a file may have any number."""


class Unreadable(Exception):
    """A file that cannot be read (on); what was read of it before is kept."""


@dataclass
class Unread:
    """What was not read of an input so far."""

    columns: dict[str, None] = field(default_factory=dict)
    """Columns that no reader knows, in the order in which they came."""
    seen: dict[str, None] = field(default_factory=dict)
    """All columns."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files and members of tars: what they are -> how many."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each."""
    noted: set[str] = field(default_factory=set)
    mapped: tuple[str, ...] = ()
    """Columns that --columns names."""

    @property
    def absent(self) -> list[str]:
        """Columns that --columns names and that no row had, once there were rows."""
        is_known = 0 < len(self.noted) < MAX_NOTED
        return [name for name in self.mapped if name not in self.noted] if is_known else []

    def note_columns(self, names: Iterable[str]) -> None:
        """Take up a row's columns."""
        for name in names:
            if name in self.noted or len(self.noted) >= MAX_NOTED:
                continue
            self.noted.add(name)
            if len(self.seen) < MAX_NAMES:
                self.seen[printable(name)] = None
            is_read = name in KNOWN_COLUMNS or name in self.mapped
            if not is_read and len(self.columns) < MAX_NAMES:
                self.columns[printable(name)] = None

    def note_left_out(self, what: str, example: str) -> None:
        """Count a file or member that is not read."""
        if what not in self.left_out and len(self.left_out) >= MAX_NAMES:
            what = "others"
        what = printable(what)
        self.left_out[what] = self.left_out.get(what, 0) + 1
        self.examples.setdefault(what, printable(example))

    def lines(self) -> list[str]:
        """What to tell the user, one line each."""
        lines = unread_lines(self.columns, self.left_out, self.examples)
        if self.absent:
            lines.append(
                f"--columns names what no row has: {', '.join(map(printable, self.absent))}"
            )
        return lines


def unread_lines(
    columns: Iterable[str], left_out: dict[str, int], examples: dict[str, str]
) -> list[str]:
    """What to tell a user whose input has these columns, files and members."""
    lines = [
        f"{count} {what} not read, the first is {examples.get(what, '?')}"
        for what, count in left_out.items()
    ]
    if names := ", ".join(columns):
        lines.append(
            f"columns not read: {names}; pictures come from {', '.join(IMAGE_COLUMNS)}, "
            "others by --columns image=NAME,question=NAME"
        )
    return lines
