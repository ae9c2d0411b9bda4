"""TRL's conversational preference parquet."""

from __future__ import annotations

from typing import Any, ClassVar

from stream_engine.outputs.formats.base import EXTRAS, PairRow, ParquetExport, extras
from stream_engine.outputs.formats.prompt import embedded_images, question_parts
from stream_engine.outputs.parquet import IMAGE, STRING
from stream_engine.records import Answer


class TrlExport(ParquetExport):
    """TRL's conversational preference format; any number of images, none included.

    The ids that TRL's own collator makes of a row are those that the model was asked, for each
    architecture of transformers that is tested (tests/outputs/test_same_prompt_trl.py).
    """

    features: ClassVar[dict[str, Any]] = {
        "images": [IMAGE],
        "prompt": [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}],
        "chosen": [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}],
        "rejected": [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}],
        **EXTRAS,
    }

    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        content = [
            {"type": "image" if part is None else "text", "text": part}
            for part in question_parts(row.sample)
        ]
        return {
            "images": embedded_images(row.sample),
            "prompt": [{"role": "user", "content": content}],
            "chosen": self.reply(row.chosen),
            "rejected": self.reply(row.rejected),
            **extras(row),
        }

    @staticmethod
    def reply(answer: Answer) -> list[dict[str, Any]]:
        """An answer as the assistant's turn."""
        return [{"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
