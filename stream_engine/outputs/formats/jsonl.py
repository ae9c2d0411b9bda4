"""Rows as JSON lines, and their images as files beside them. Knows no trainer's columns."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from stream_engine.outputs.formats.base import Export, PairRow
from stream_engine.outputs.parquet import Part
from stream_engine.run_dir.shards import image_extension
from stream_engine.store.atomic import fsync_folder


class JsonlExport(Export):
    """Rows to `train.jsonl`, images to files beside it, named by the sample's key.

    `datasets` types the column `images` by the file's first 10 MB, and takes lists that are all
    empty there for lists of nulls, which no later row with an image fits. So the first row has an
    image: rows without one that come before it wait in a file of their own. When no row has an
    image there is no column.
    """

    data_files = "train.jsonl"

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        super().__init__(folder, max_part_bytes=max_part_bytes)
        (folder / "images").mkdir(exist_ok=True)
        self.path = folder / self.data_files
        self.waiting_path = folder / ".waiting.jsonl"
        self.file: BinaryIO = open(self.waiting_path, "w+b")  # noqa: SIM115  closed in close()
        self.has_images = False
        self.num_rows = 0
        self.last_key = ""

    @abstractmethod
    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        """The row's JSON object but for its `images`, or the reason why there is none."""

    def write(self, row: PairRow) -> str | None:
        columns = self.to_row(row)
        if isinstance(columns, str):
            return columns
        names = [
            f"images/{row.sample.key}.{i}.{image_extension(image.data)}"
            for i, image in enumerate(row.sample.images)
        ]
        if row.sample.key != self.last_key:  # the pairs of a sample come one after the other
            for name, image in zip(names, row.sample.images):
                (self.folder / name).write_bytes(image.data)
            self.last_key = row.sample.key
        if names and not self.has_images:
            self.begin_with({**columns, "images": names})
        else:
            self.write_line({**columns, "images": names} if self.has_images else columns)
        self.num_rows += 1
        return None

    def begin_with(self, first: dict[str, Any]) -> None:
        """Begin the file with the first row that has an image; those that waited follow."""
        self.has_images = True
        with self.file as waiting:
            self.file = open(self.path, "wb")  # noqa: SIM115  closed in close()
            self.write_line(first)
            waiting.seek(0)
            for line in waiting:
                self.write_line({**msgspec.json.decode(line), "images": []})
        self.waiting_path.unlink()

    def write_line(self, columns: dict[str, Any]) -> None:
        self.file.write(msgspec.json.encode(columns) + b"\n")

    def close(self) -> list[Part]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not self.has_images:
            self.waiting_path.rename(self.path)
        fsync_folder(self.folder / "images")
        fsync_folder(self.folder)
        return [Part(name=self.path.name, rows=self.num_rows, bytes=self.path.stat().st_size)]
