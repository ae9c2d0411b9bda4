"""LLaMA-Factory's ranking rows in ShareGPT form, and the dataset_info.json that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from stream_engine.outputs.formats.base import EXTRAS, PairRow, ParquetExport, Split, extras
from stream_engine.outputs.formats.jsonl import JsonlExport
from stream_engine.outputs.formats.prompt import (
    embedded_images,
    has_media_mark,
    marked_question,
)
from stream_engine.outputs.parquet import IMAGE, STRING

TURN = {"from": STRING, "value": STRING}
COLUMNS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
IMAGES = {"images": "images"}
NAMES: Mapping[Split, str] = {"train": "stream_engine", "test": "stream_engine_test"}
"""What each split is called in the training YAML."""


class LlamaFactoryExport(ParquetExport):
    """Parquet with the pictures inside.

    The parts of each split lie in a folder of their own: LLaMA-Factory takes a file or a folder
    that holds nothing else.
    """

    data_files = "{split}/*.parquet"
    features: ClassVar[dict[str, Any]] = {
        "conversations": [TURN],
        "chosen": TURN,
        "rejected": TURN,
        "images": [IMAGE],
        **EXTRAS,
    }

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        turns = turns_of(row)
        if isinstance(turns, str):
            return turns
        return {**turns, "images": embedded_images(row.sample), **extras(row)}

    def describe(self, name: Callable[[str], str]) -> None:
        folders = {split: name(f"{split}/").rstrip("/") for split in self.parts}
        write_info(self.folder, {s: (folders[s], COLUMNS | IMAGES) for s in self.parts})


class LlamaFactoryJsonlExport(JsonlExport):
    """JSON lines, the pictures as files beside them."""

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        turns = turns_of(row)
        return turns if isinstance(turns, str) else {**turns, **extras(row)}

    def describe(self, name: Callable[[str], str]) -> None:
        files = {
            split: (name(file.path.name), COLUMNS | (IMAGES if file.has_images else {}))
            for split, file in self.files.items()
        }
        write_info(self.folder, files)


def turns_of(row: PairRow) -> dict[str, Any] | str:
    """The row's texts, or the reason why there are none."""
    if has_media_mark(row):
        return "media_mark"
    return {
        "conversations": [{"from": "human", "value": marked_question(row.sample)}],
        "chosen": {"from": "gpt", "value": row.chosen.text},
        "rejected": {"from": "gpt", "value": row.rejected.text},
    }


def write_info(folder: Path, files: Mapping[Split, tuple[str, Mapping[str, str]]]) -> None:
    """dataset_info.json: by split, its file or folder, and LLaMA-Factory's columns -> ours."""
    info = {
        NAMES[split]: {
            "file_name": name,
            "ranking": True,
            "formatting": "sharegpt",
            "columns": columns,
        }
        for split, (name, columns) in files.items()
    }
    path = folder / "dataset_info.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")
