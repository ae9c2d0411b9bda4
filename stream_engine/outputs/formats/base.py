"""What a format is: handed rows one at a time, it writes a folder of files.

Knows no trainer and no run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stream_engine.outputs.parquet import ParquetParts, Part, arrow_schema
from stream_engine.records import Answer, PreferencePair, Sample


@dataclass(frozen=True)
class PairRow:
    """One row of the dataset before it has a schema."""

    sample: Sample
    chosen: Answer
    rejected: Answer
    pair: PreferencePair
    num_prompt_tokens: int = 0


class Export(ABC):
    """Writes rows into a folder that nobody else reads yet."""

    data_files: ClassVar[str]
    """What of the folder `datasets.load_dataset` is to read."""

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def write(self, row: PairRow) -> str | None:
        """Take a row, or return the reason why this format cannot express it."""

    @abstractmethod
    def close(self) -> list[Part]:
        """Finish every file, durably; returns the files that hold rows, in order."""


class ParquetExport(Export):
    """Rows to parquet parts."""

    data_files = "train-*-of-*.parquet"
    features: ClassVar[dict[str, Any]]
    """Column -> Hugging Face feature, in the order of the columns."""

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        super().__init__(folder, max_part_bytes=max_part_bytes)
        self.schema = arrow_schema(self.features)
        self.parts = ParquetParts(folder, self.schema, max_part_bytes=max_part_bytes)

    @abstractmethod
    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        """The row's columns, or the reason why there are none."""

    def write(self, row: PairRow) -> str | None:
        columns = self.to_row(row)
        if isinstance(columns, str):
            return columns
        self.parts.write(columns)
        return None

    def close(self) -> list[Part]:
        return self.parts.close()
