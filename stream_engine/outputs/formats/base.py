"""What a format is: handed rows one at a time, it writes a folder of files.

Knows no trainer and no run.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from stream_engine.outputs.parquet import FLOAT, STRING, ParquetParts, Part, arrow_schema
from stream_engine.records import Answer, PreferencePair, Sample

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

SCORES: dict[str, Any] = {"chosen_score": FLOAT, "rejected_score": FLOAT, "margin": FLOAT}
"""Columns of the scores, and their features."""
EXTRAS: dict[str, Any] = {
    "idx": STRING,
    "key": STRING,
    "ds_name": STRING,
    "origin_dataset": STRING,
    "origin_split": STRING,
    "image_path": STRING,
    "metainfos": STRING,
    "chosen_model": STRING,
    "rejected_model": STRING,
    **SCORES,
}
"""Columns beside a trainer's own: whence a row comes and how its answers were scored."""


@dataclass(frozen=True)
class PairRow:
    """One row of the dataset before it has a schema."""

    sample: Sample
    chosen: Answer
    rejected: Answer
    pair: PreferencePair
    num_prompt_tokens: int = 0
    split: Split = "train"


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


def extras(row: PairRow) -> dict[str, Any]:
    """The values of the columns EXTRAS."""
    models = {"chosen_model": row.chosen.model, "rejected_model": row.rejected.model}
    return {name: getattr(row.sample, name, "") for name in EXTRAS} | models | scores(row)


class Export(ABC):
    """Writes rows into a folder that nobody else reads yet."""

    data_files: ClassVar[str]
    """What of the folder `datasets.load_dataset` is to read for a split, `{split}` its name."""

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        self.folder = folder
        self.max_part_bytes = max_part_bytes
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def write(self, row: PairRow) -> str | None:
        """Take a row, or return the reason why this format cannot express it."""

    @abstractmethod
    def close(self) -> list[Part]:
        """Finish every file; returns those that hold rows, in order."""

    def describe(self, name: Callable[[str], str]) -> None:  # noqa: B027  most need none
        """Write what tells trainers of these files; `name` is what one will be called."""


class ParquetExport(Export):
    """Rows to parquet parts of each split; without a row there is still a part to train on."""

    data_files = "{split}-*-of-*.parquet"
    features: ClassVar[dict[str, Any]]
    """Column -> Hugging Face feature, in the order of the columns."""

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        super().__init__(folder, max_part_bytes=max_part_bytes)
        self.schema = arrow_schema(self.features)
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

    @abstractmethod
    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        """The row's columns, or the reason why there are none."""

    def write(self, row: PairRow) -> str | None:
        columns = self.to_row(row)
        if isinstance(columns, str):
            return columns
        self.parts_of(row.split).write(columns)
        return None

    def close(self) -> list[Part]:
        found = []
        for parts in self.parts.values():
            for part in parts.close():
                name = (parts.folder / part.name).relative_to(self.folder).as_posix()
                found.append(msgspec.structs.replace(part, name=name))
        return found
