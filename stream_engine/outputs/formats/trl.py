"""TRL's conversational preference parquet."""

from __future__ import annotations

from typing import Any, ClassVar

from stream_engine.outputs.formats.base import PairRow, ParquetExport
from stream_engine.outputs.formats.prompt import question_parts
from stream_engine.outputs.parquet import FLOAT, IMAGE, STRING
from stream_engine.records import Answer


class TrlExport(ParquetExport):
    """TRL's conversational preference format; any number of images, none included."""

    features: ClassVar[dict[str, Any]] = {
        "images": [IMAGE],
        "prompt": [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}],
        "chosen": [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}],
        "rejected": [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}],
        "idx": STRING,
        "chosen_score": FLOAT,
        "rejected_score": FLOAT,
        "margin": FLOAT,
    }

    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        images = [{"bytes": image.data, "path": image.path} for image in row.sample.images]
        content = [
            {"type": "image" if part is None else "text", "text": part}
            for part in question_parts(row.sample)
        ]
        return {
            "images": images,
            "prompt": [{"role": "user", "content": content}],
            "chosen": self.reply(row.chosen),
            "rejected": self.reply(row.rejected),
            "idx": row.sample.idx,
            "chosen_score": row.pair.chosen_score,
            "rejected_score": row.pair.rejected_score,
            "margin": row.pair.margin,
        }

    @staticmethod
    def reply(answer: Answer) -> list[dict[str, Any]]:
        """An answer as the assistant's turn."""
        return [{"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
