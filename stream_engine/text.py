"""Words for people: times, errors; and what of a text people see.

Knows nothing but the standard library.
"""

from __future__ import annotations

import difflib
import errno
import getpass
import os
import re
import unicodedata
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


DENIED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
"""Codes that say that somebody else must give access first."""


def describe(error: BaseException) -> str:
    """An error in one line, with its type where the message alone would not tell."""
    if isinstance(error, OSError) and error.errno in DENIED and error.filename:
        return f"{error.strerror}: user {user_name()} has no access to {lasting_name(error)}"
    text = " ".join(str(error).split())
    known = type(error).__module__.startswith("stream_engine")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def lasting_name(error: OSError) -> str:
    """The file that an error is of; of one in the making, its folder."""
    path = os.fsdecode(error.filename2 or error.filename)
    folder, _, name = path.rpartition("/")
    return folder if name.endswith(".tmp") and folder else path


def home_in(paths: str) -> str:
    """Paths, with commas between them, with the home folder for a `~` at their beginning."""
    return ",".join(os.path.expanduser(path) for path in paths.split(","))


def user_name() -> str:
    """Who runs this process, by name where the system knows one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())


def nearest(name: str, known: Sequence[str]) -> str:
    """`'; did you mean ...?'` for the closest known name, or an empty string.

    Case does not count, nor whether words are joined by dashes or underscores.
    """
    simple = {one.lower().replace("-", "_"): one for one in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), simple, n=1)
    return f"; did you mean {simple[close[0]]!r}?" if close else ""


UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e001f\U000e0080-\U000e0fff]+"
)
"""What Unicode calls Default_Ignorable_Code_Point, without the tags that tell flags apart."""


def as_seen(text: str) -> str:
    """A text without what has no width of its own, its marks composed with their letters (NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", UNSEEN.sub("", text))


def reading(text: str) -> str:
    """What two texts have in common that are the same to a reader; white space makes no other."""
    return " ".join(as_seen(text).split())


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"[\s\xef\xbb\xbf]*<(!doctype html|html)", re.IGNORECASE)
HEAD_BYTES = 256


def not_the_file(head: bytes) -> str:
    """What stands in a file's place, and what helps, told by how it begins; "" for a file itself.

    A clone without Git LFS holds pointers, a download that was refused a page that says so.
    """
    if head.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    if WEB_PAGE.match(head):
        return "a web page, not the file itself: its download was refused; fetch it again"
    return ""


MAX_LINE = 4000
"""Characters of a line that is shown."""


def printable(value: object, *, limit: int = MAX_LINE) -> str:
    """Text with foreign parts (ids, paths, names of columns) as it may be shown: on one line,
    without terminal controls, cut when it is long."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
