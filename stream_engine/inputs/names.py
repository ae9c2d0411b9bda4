"""What names of files say: the braces of a pattern, and the parts that a dataset is made of."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from stream_engine.errors import ConfigError

BRACES = re.compile(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}")
PART = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})(?P<total>-of-(?P<count>\d{5})\..+)", re.DOTALL)
"""One of the parts as `datasets` and others write them: train-00000-of-00012.parquet."""
MAX_NAMES = 100_000


def expanded(pattern: str) -> list[str]:
    """What braces mean to a shell and to WebDataset, `{000..012}` or `{a,b}`, none within another;
    without any, the pattern itself.

    Raises:
        ConfigError: for more names than anybody has files.
    """
    pieces = BRACES.split(pattern)  # what stands between braces, and within, by turns
    choices = [words_of(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MAX_NAMES:
        raise ConfigError(f"{pattern!r} stands for more than {MAX_NAMES} names")
    return list(map("".join, itertools.product(*choices)))


def words_of(inner: str) -> Sequence[str]:
    """The words that one pair of braces stands for."""
    first, _, last = inner.partition("..")
    if "," in inner:
        return inner.split(",")
    step = 1 if int(first) <= int(last) else -1
    numbers = range(int(first), int(last) + step, step)[: MAX_NAMES + 1]
    return [str(number).zfill(len(first)) for number in numbers]


def missing_parts(names: Iterable[str]) -> Iterator[str]:
    """The parts that the names of others tell of, and that are not there."""
    there = set(names)
    found = [part for part in map(PART.match, there) if part]
    datasets = {(part["stem"], part["total"], int(part["count"])) for part in found}
    for stem, total, count in sorted(datasets):
        for number in range(count):
            if (name := f"{stem}{number:05d}{total}") not in there:
                yield name
