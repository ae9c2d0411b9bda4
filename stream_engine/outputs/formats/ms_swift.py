"""ms-swift's DPO rows: messages, rejected_response, images."""

from __future__ import annotations

from typing import Any, ClassVar

from stream_engine.outputs.formats.base import EXTRAS, PairRow, ParquetExport, extras
from stream_engine.outputs.formats.jsonl import JsonlExport
from stream_engine.outputs.formats.prompt import (
    embedded_images,
    has_media_mark,
    marked_question,
)
from stream_engine.outputs.parquet import IMAGE, STRING


class MsSwiftExport(ParquetExport):
    """Parquet with the pictures inside."""

    features: ClassVar[dict[str, Any]] = {
        "messages": [{"role": STRING, "content": STRING}],
        "rejected_response": STRING,
        "images": [IMAGE],
        **EXTRAS,
    }

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        turns = turns_of(row)
        if isinstance(turns, str):
            return turns
        return {**turns, "images": embedded_images(row.sample), **extras(row)}


class MsSwiftJsonlExport(JsonlExport):
    """JSON lines, the pictures as files beside them."""

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        turns = turns_of(row)
        return turns if isinstance(turns, str) else {**turns, **extras(row)}


def turns_of(row: PairRow) -> dict[str, Any] | str:
    """The row's texts, or the reason why there are none."""
    if has_media_mark(row):
        return "media_mark"
    return {
        "messages": [
            {"role": "user", "content": marked_question(row.sample)},
            {"role": "assistant", "content": row.chosen.text},
        ],
        "rejected_response": row.rejected.text,
    }
