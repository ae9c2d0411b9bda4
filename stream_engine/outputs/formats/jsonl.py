"""Rows as JSON lines, and their images as files beside them. Knows no trainer's columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from stream_engine.outputs.formats.base import Export, Packed, PairRow, Split
from stream_engine.outputs.parquet import Part
from stream_engine.run_dir.shards import image_extension


class JsonlRow(msgspec.Struct, frozen=True, array_like=True):
    """A row on its way to its file."""

    split: Split
    columns: dict[str, Any]
    images: list[str]
    """The files of its pictures."""
    data: list[bytes]
    """Their contents, but for a row whose pictures came with the row before it."""


class JsonlExport(Export):
    """Rows to a file of JSON lines for each split, images to files beside it, named by the
    sample's key."""

    data_files = "{split}.jsonl"

    def __init__(self, folder: Path, *, max_part_bytes: int) -> None:
        super().__init__(folder, max_part_bytes=max_part_bytes)
        (folder / "images").mkdir(exist_ok=True)
        self.files: dict[Split, JsonlFile] = {}
        self.file_of("train")

    def file_of(self, split: Split) -> JsonlFile:
        """The file of a split, begun when its first row comes."""
        if split not in self.files:
            self.files[split] = JsonlFile(self.folder / self.data_files.format(split=split))
        return self.files[split]

    @classmethod
    @abstractmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        """The row's JSON object but for its `images`, or the reason why there is none."""

    @classmethod
    def pack(cls, rows: Sequence[PairRow]) -> Packed:
        refusals: list[str | None] = []
        lines: list[JsonlRow] = []
        last_key = ""
        for row in rows:
            columns = cls.to_row(row)
            refusals.append(columns if isinstance(columns, str) else None)
            if isinstance(columns, str):
                continue
            images = {
                f"images/{row.sample.key}.{i}.{image_extension(image.data)}": image.data
                for i, image in enumerate(row.sample.images)
            }
            is_new = row.sample.key != last_key  # the pairs of a sample come one after the other
            data = list(images.values()) if is_new else []
            lines.append(JsonlRow(row.split, columns, list(images), data))
            last_key = row.sample.key
        return Packed(refusals, msgspec.msgpack.encode(lines))

    def take(self, content: bytes) -> None:
        for line in msgspec.msgpack.decode(content, type=list[JsonlRow]):
            for name, image in zip(line.images, line.data):
                (self.folder / name).write_bytes(image)
            self.file_of(line.split).write(line.columns, line.images)

    def close(self) -> list[Part]:
        return [file.close() for file in self.files.values()]


class JsonlFile:
    """One file of rows.

    `datasets` types the column `images` by the file's first 10 MB, and takes lists that are all
    empty there for lists of nulls, which no later row with an image fits. So the first row has an
    image: rows without one that come before it wait in a file of their own. When no row has an
    image there is no column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting_path = path.parent / f".waiting-{path.name}"
        self.file: BinaryIO = open(self.waiting_path, "w+b")  # noqa: SIM115  closed in close()
        self.has_images = False
        self.num_rows = 0

    def write(self, columns: dict[str, Any], images: list[str]) -> None:
        """Take a row, its images by their files."""
        if images and not self.has_images:
            self.begin_with({**columns, "images": images})
        else:
            self.write_line({**columns, "images": images} if self.has_images else columns)
        self.num_rows += 1

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

    def close(self) -> Part:
        """Finish the file. One without rows is a blank line: an empty file counts as absent."""
        if not self.num_rows:
            self.file.write(b"\n")
        self.file.close()
        if not self.has_images:
            self.waiting_path.rename(self.path)
        return Part(name=self.path.name, rows=self.num_rows, bytes=self.path.stat().st_size)
