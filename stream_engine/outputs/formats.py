"""The final dataset in each trainer's schema. A format is one class here and one line in EXPORTS.

    rlaifv         RLAIF-V's parquet, with the reference model's log-probs (the default)
    trl            TRL's conversational preference parquet
    ms_swift       jsonl and an images folder for ms-swift
    llama_factory  jsonl, dataset_info.json and an images folder for LLaMA-Factory

An export is handed rows one at a time and holds at most one row group of them. A row that its
schema cannot express is refused by a reason, which the merger counts.

A question may hold a literal `<image>`. Marks that stand inside the text, one for each image, stay
where they are; else the images come first, as every trainer puts them, and marks are taken out.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import msgspec

from stream_engine.config import nearest
from stream_engine.errors import ConfigError
from stream_engine.outputs.parquet import (
    FLOAT,
    IMAGE,
    STRING,
    ParquetParts,
    Part,
    arrow_schema,
    fsync_file,
    write_empty,
)
from stream_engine.records import IMAGE_MARK, Answer, PreferencePair, Sample, without_marks
from stream_engine.run_dir.shards import image_extension
from stream_engine.store.atomic import fsync_folder

LOGP_DIGITS = 6  # of the per-token log-probs in the logps column


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


class RlaifvExport(ParquetExport):
    """RLAIF-V's columns, and `logps`. Its trainer reads exactly one image a row.

    `logps` is a JSON string {"logps": [chosen sum, chosen mean, chosen per token, the same three
    of rejected]}: log-probs of the instruct model, untempered, over the answer's tokens and the
    end token where it was generated. The lists per token are aligned as the trainer's own pass
    aligns them: entry t belongs to token t + 1 of prompt and answer, so they begin with a zero
    for each prompt position but the first (the trainer masks these), and end with a zero in place
    of an end token that was not generated (the trainer appends one to every answer).
    """

    features: ClassVar[dict[str, Any]] = {
        "ds_name": STRING,
        "image": IMAGE,
        "question": STRING,
        "chosen": STRING,
        "rejected": STRING,
        "origin_dataset": STRING,
        "origin_split": STRING,
        "idx": STRING,
        "image_path": STRING,
        "logps": STRING,
    }
    marker = "train-logps.parquet"
    """A file without rows: the trainer uses stored log-probs if a file name has `logp` in it."""

    def to_row(self, row: PairRow) -> dict[str, Any] | str:
        if len(row.sample.images) != 1:
            return "needs_one_image"
        if inline_parts(row.sample) is not None:
            return "inline_image_mark"  # the trainer puts the image in front, whatever is asked
        image = row.sample.images[0]
        return {
            "ds_name": row.sample.ds_name or "stream_engine",
            "image": {"bytes": image.data, "path": image.path},
            "question": without_marks(row.sample.question),
            "chosen": row.chosen.text,
            "rejected": row.rejected.text,
            "origin_dataset": row.sample.origin_dataset,
            "origin_split": row.sample.origin_split,
            "idx": row.sample.idx,
            "image_path": row.sample.image_path or image.path,
            "logps": logps_json(row),
        }

    def close(self) -> list[Part]:
        write_empty(self.folder / self.marker, self.schema)
        return super().close()


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
    def to_row(self, row: PairRow) -> dict[str, Any]:
        """The row's JSON object but for its `images`."""

    def write(self, row: PairRow) -> str | None:
        names = [
            f"images/{row.sample.key}.{i}.{image_extension(image.data)}"
            for i, image in enumerate(row.sample.images)
        ]
        if row.sample.key != self.last_key:  # the pairs of a sample come one after the other
            for name, image in zip(names, row.sample.images):
                (self.folder / name).write_bytes(image.data)
            self.last_key = row.sample.key
        columns = self.to_row(row)
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


class MsSwiftExport(JsonlExport):
    """ms-swift's DPO rows: messages, rejected_response, images."""

    def to_row(self, row: PairRow) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": marked_question(row.sample)},
                {"role": "assistant", "content": row.chosen.text},
            ],
            "rejected_response": row.rejected.text,
        }


class LlamaFactoryExport(JsonlExport):
    """LLaMA-Factory's ranking rows in ShareGPT form, and the dataset_info.json that names them."""

    def to_row(self, row: PairRow) -> dict[str, Any]:
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


EXPORTS: dict[str, type[Export]] = {
    "rlaifv": RlaifvExport,
    "trl": TrlExport,
    "ms_swift": MsSwiftExport,
    "llama_factory": LlamaFactoryExport,
}


def export_class(name: str) -> type[Export]:
    """The format of that name.

    Raises:
        ConfigError: for an unknown name, with the known ones.
    """
    if name not in EXPORTS:
        raise ConfigError(
            f"unknown format {name!r}{nearest(name, list(EXPORTS))}; "
            f"choose from {', '.join(EXPORTS)}"
        )
    return EXPORTS[name]


def question_parts(sample: Sample) -> list[str | None]:
    """The user's turn in order: texts, and None where an image stands."""
    front: list[str | None] = [None] * len(sample.images)
    return inline_parts(sample) or [*front, without_marks(sample.question)]


def marked_question(sample: Sample) -> str:
    """The user's turn with one mark an image."""
    parts = question_parts(sample)
    return "".join(IMAGE_MARK if part is None else part for part in parts)


def inline_parts(sample: Sample) -> list[str | None] | None:
    """The parts of a question with a mark inside its text for each image; None for any other.

    Marks in front of the whole text, or one mark behind it, are the plain form: images first.
    """
    texts = sample.question.split(IMAGE_MARK)
    num_marks = len(texts) - 1
    is_in_front = not any(map(str.strip, texts[:-1]))
    is_plain = is_in_front or (num_marks == 1 and not texts[1].strip())
    if num_marks != len(sample.images) or is_plain:
        return None
    parts = [part for text in texts for part in (text, None)][:-1]
    return [part for part in parts if part != ""]


def logps_json(row: PairRow) -> str:
    """The `logps` column: see RlaifvExport."""
    return msgspec.json.encode(
        {
            "logps": [
                *answer_logps(row.chosen, row.num_prompt_tokens),
                *answer_logps(row.rejected, row.num_prompt_tokens),
            ]
        }
    ).decode()


def answer_logps(answer: Answer, num_prompt_tokens: int) -> tuple[float, float, list[float]]:
    """Sum, mean and per-token list of an answer's reference log-probs."""
    logps = answer.scored_logps
    total = sum(logps)
    per_token = [0.0] * max(0, num_prompt_tokens - 1)
    per_token += [round(logp, LOGP_DIGITS) for logp in logps]
    if answer.end_logp is None:
        per_token.append(0.0)
    return total, total / max(1, len(logps)), per_token
