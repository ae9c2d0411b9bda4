"""ms-swift's jsonl and images folder."""

from __future__ import annotations

from typing import Any

from stream_engine.outputs.formats.base import PairRow
from stream_engine.outputs.formats.jsonl import JsonlExport
from stream_engine.outputs.formats.prompt import has_media_mark, marked_question


class MsSwiftExport(JsonlExport):
    """ms-swift's DPO rows: messages, rejected_response, images."""

    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        if has_media_mark(row):
            return "media_mark"
        return {
            "messages": [
                {"role": "user", "content": marked_question(row.sample)},
                {"role": "assistant", "content": row.chosen.text},
            ],
            "rejected_response": row.rejected.text,
        }
