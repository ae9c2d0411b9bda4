"""ms-swift's DPO rows: messages, rejected_response, images."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from stream_engine.outputs.formats.base import EXTRAS, PairRow, ParquetExport, extras
from stream_engine.outputs.formats.jsonl import JsonlExport
from stream_engine.outputs.formats.prompt import (
    embedded_images,
    has_media_mark,
    marked_question,
    texts_of,
)
from stream_engine.outputs.parquet import IMAGE, STRING
from stream_engine.records import MEDIA_MARKS

MARKS = (*MEDIA_MARKS, "<bbox>", "<ref-object>", "<cot-process>", "<start-image>")
"""Where ms-swift cuts a text before it tokenises it, whether something is put there or not."""
PICTURE_TAG = re.compile(r"<img>.+?</img>")
"""What ms-swift takes for a picture in a row without pictures."""


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
    is_tagged = not row.sample.images and any(map(PICTURE_TAG.search, texts_of(row)))
    if is_tagged or has_media_mark(row, MARKS):
        return "media_mark"
    return {
        "messages": [
            {"role": "user", "content": marked_question(row.sample)},
            {"role": "assistant", "content": row.chosen.text},
        ],
        "rejected_response": row.rejected.text,
    }
