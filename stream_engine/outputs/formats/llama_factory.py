"""LLaMA-Factory's jsonl, dataset_info.json and images folder."""

from __future__ import annotations

from typing import Any

import msgspec

from stream_engine.outputs.formats.base import PairRow
from stream_engine.outputs.formats.jsonl import JsonlExport
from stream_engine.outputs.formats.prompt import has_media_mark, marked_question
from stream_engine.outputs.parquet import Part, fsync_file


class LlamaFactoryExport(JsonlExport):
    """LLaMA-Factory's ranking rows in ShareGPT form, and the dataset_info.json that names them."""

    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        if has_media_mark(row):
            return "media_mark"
        return {
            "conversations": [{"from": "human", "value": marked_question(row.sample)}],
            "chosen": {"from": "gpt", "value": row.chosen.text},
            "rejected": {"from": "gpt", "value": row.rejected.text},
        }

    def close(self) -> list[Part]:
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
        info = {
            "stream_engine": {
                "file_name": self.data_files,
                "ranking": True,
                "formatting": "sharegpt",
                "columns": columns | ({"images": "images"} if self.has_images else {}),
            }
        }
        path = self.folder / "dataset_info.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")
        fsync_file(path)
        return super().close()
