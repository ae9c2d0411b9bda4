"""What a format is: handed rows one at a time, it writes a folder of files.

An `Export` is handed pairs, a `Ranking` questions with all their answers, best first.

Knows no trainer and no run.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from stream_engine.outputs.parquet import (
    FLOAT,
    INT,
    STRING,
    PackedRows,
    ParquetParts,
    Part,
    arrow_schema,
    pack_rows,
)
from stream_engine.records import Answer, AnswerScore, PreferencePair, Sample

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

SCORES: dict[str, Any] = {"chosen_score": FLOAT, "rejected_score": FLOAT, "margin": FLOAT}
"""Columns of the scores, and their features."""
ORIGIN: dict[str, Any] = {
    "idx": STRING,
    "key": STRING,
    "ds_name": STRING,
    "origin_dataset": STRING,
    "origin_split": STRING,
    "image_path": STRING,
    "metainfos": STRING,
}
"""Columns of whence a question comes."""
EXTRAS: dict[str, Any] = {
    **ORIGIN,
    "chosen_model": STRING,
    "rejected_model": STRING,
    **SCORES,
    "round": INT,
}
"""Columns beside a trainer's own: whence a pair comes and how its answers were scored."""
ANSWER_EXTRAS: dict[str, Any] = {
    **ORIGIN,
    "model": STRING,
    "score": FLOAT,
    "rank": INT,
    "round": INT,
}
"""The same of a row that is an answer by itself."""


@dataclass(frozen=True)
class PairRow:
    """One row of the dataset before it has a schema."""

    sample: Sample
    chosen: Answer
    rejected: Answer
    pair: PreferencePair
    num_prompt_tokens: int = 0
    split: Split = "train"
    round: int = 1
    """Counted from 1: which of the run's instruct models answered."""


@dataclass(frozen=True)
class RankedAnswer:
    """One answer to a question; `score` and `rank` (1 is the best, equal scores share it) are None
    where it could not be scored. `unfit` is why it is no example of a good or bad answer, or ""."""

    answer: Answer
    score: AnswerScore | None
    rank: int | None
    unfit: str = ""


@dataclass(frozen=True)
class RankedRow:
    """A question with all its answers, best first, those without a score last."""

    sample: Sample
    answers: list[RankedAnswer]
    split: Split = "train"
    round: int = 1

    @property
    def fit(self) -> list[RankedAnswer]:
        """The answers that may be examples, best first."""
        return [one for one in self.answers if not one.unfit]


class Packed(NamedTuple):
    """Rows on their way to the file of a format."""

    refusals: list[str | None]
    """For each row the reason why the format cannot express it; None: it is in the content."""
    content: bytes


def split_of(key: str, test_fraction: float) -> Split:
    """Where all pairs of a question go: its key alone decides, whatever else is in the run."""
    share = int(key[:8], 16) / 2**32
    return "test" if share < test_fraction else "train"


def split_named(name: str) -> str:
    """The split of a part, which its name begins with."""
    return re.split(r"[-./]", name, maxsplit=1)[0]


def scores(row: PairRow) -> dict[str, float]:
    """The values of the columns SCORES."""
    return {
        "chosen_score": float(row.pair.chosen_score),
        "rejected_score": float(row.pair.rejected_score),
        "margin": float(row.pair.margin),
    }


def origin(sample: Sample) -> dict[str, Any]:
    """The values of the columns ORIGIN."""
    return {name: getattr(sample, name) for name in ORIGIN}


def extras(row: PairRow) -> dict[str, Any]:
    """The values of the columns EXTRAS."""
    models = {"chosen_model": row.chosen.model, "rejected_model": row.rejected.model}
    return origin(row.sample) | models | scores(row) | {"round": row.round}


def answer_extras(row: RankedRow, one: RankedAnswer) -> dict[str, Any]:
    """The values of the columns ANSWER_EXTRAS."""
    score = None if one.score is None else float(one.score.score)
    own = {"model": one.answer.model, "score": score, "rank": one.rank, "round": row.round}
    return origin(row.sample) | own


class DatasetFiles(ABC):
    """Files of rows in a folder that nobody else reads yet."""

    data_files: ClassVar[str]
    """What of the folder `datasets.load_dataset` is to read for a split, `{split}` its name."""

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        self.folder = folder
        self.max_part_bytes = max_part_bytes
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def close(self) -> list[Part]:
        """Finish every file; returns those that hold rows, in order."""

    def describe(self, name: Callable[[str], str]) -> None:  # noqa: B027  most need none
        """Write what tells trainers of these files; `name` is what one will be called."""


class Export(DatasetFiles):
    """Writes pairs."""

    needs_logps: ClassVar[bool] = False
    """Whether its rows hold the instruct model's log-probs."""

    @classmethod
    @abstractmethod
    def pack(cls, rows: Sequence[PairRow]) -> Packed:
        """Rows as `take` wants them, in any process; those that it cannot express are refused."""

    @abstractmethod
    def take(self, content: bytes) -> None:
        """Write what `pack` made."""

    def write(self, row: PairRow) -> str | None:
        """Take a row, or return the reason why this format cannot express it."""
        packed = self.pack([row])
        self.take(packed.content)
        return packed.refusals[0]


class ParquetFiles(DatasetFiles):
    """Rows to parquet parts of each split; without a row there is still a part to train on."""

    data_files = "{split}-*-of-*.parquet"
    features: ClassVar[dict[str, Any]]
    """Column -> Hugging Face feature, in the order of the columns."""

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        super().__init__(folder, max_part_bytes=max_part_bytes)
        self.schema = arrow_schema(self.features)
        self.origin = ""
        """Of the rows that are taken next."""
        self.parts: dict[Split, ParquetParts] = {}
        self.parts_of("train")

    def parts_of(self, split: Split) -> ParquetParts:
        """The files of a split, begun when its first row comes."""
        if split not in self.parts:
            folder = (self.folder / self.data_files.format(split=split)).parent
            folder.mkdir(exist_ok=True)
            self.parts[split] = ParquetParts(
                folder, self.schema, max_part_bytes=self.max_part_bytes, split=split
            )
        return self.parts[split]

    def origins(self) -> set[str]:
        """Those of the last rows of parts, as far as can be told before all are written."""
        return {origin for parts in self.parts.values() for origin in parts.origins()}

    def close(self) -> list[Part]:
        found = []
        for parts in self.parts.values():
            for part in parts.close():
                name = (parts.folder / part.name).relative_to(self.folder).as_posix()
                found.append(msgspec.structs.replace(part, name=name))
        return found


class ParquetExport(ParquetFiles, Export):
    """Pairs as rows of parquet."""

    @classmethod
    @abstractmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        """The row's columns, or the reason why there are none."""

    @classmethod
    def pack(cls, rows: Sequence[PairRow]) -> Packed:
        refusals: list[str | None] = []
        columns: dict[Split, list[dict[str, Any]]] = {}
        for row in rows:
            made = cls.to_row(row)
            refusals.append(made if isinstance(made, str) else None)
            if not isinstance(made, str):
                columns.setdefault(row.split, []).append(made)
        schema = arrow_schema(cls.features)
        packed = {split: pack_rows(rows, schema) for split, rows in columns.items()}
        return Packed(refusals, msgspec.msgpack.encode(packed))

    def take(self, content: bytes) -> None:
        for split, rows in msgspec.msgpack.decode(content, type=dict[Split, PackedRows]).items():
            self.parts_of(split).take(rows, self.origin)


class Ranking(ParquetFiles):
    """Writes the answers of questions as rows of parquet."""

    holds: ClassVar[str]
    """What a row is, in the plural."""
    holds_single_answers: ClassVar[bool] = True
    """Whether a row is one answer, and not a question with all of them."""

    def __init__(self, folder: Path, *, max_part_bytes: int, rank: int = 3, best: int = 1) -> None:
        """`rank` and `best` are the settings of these names."""
        super().__init__(folder, max_part_bytes=max_part_bytes)
        self.rank = rank
        self.best = best

    @abstractmethod
    def to_rows(self, row: RankedRow) -> tuple[list[dict[str, Any]], Counter[str]]:
        """The rows that a question makes, and its answers that are in none of them by reason."""

    def write(self, row: RankedRow) -> Counter[str]:
        """Take a question; returns how many of its answers were dropped, by reason."""
        rows, dropped = self.to_rows(row)
        for columns in rows:
            self.parts_of(row.split).write(columns)
        return dropped
