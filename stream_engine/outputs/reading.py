"""Datasets on file, of any format, as pairs again: one row in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stream_engine.errors import ConfigError
from stream_engine.outputs.formats import RANKINGS
from stream_engine.outputs.formats.base import split_named
from stream_engine.outputs.parquet import rows_of
from stream_engine.outputs.validate import format_of, jsonl_parts, lines_of, parquet_parts
from stream_engine.records import (
    IMAGE_MARK,
    DatasetPair,
    EncodedImage,
    marks_are_in_front,
    without_marks,
)
from stream_engine.store import files
from stream_engine.store.base import Location

Row = Mapping[str, Any]


def read_pairs(folder: Location) -> Iterator[DatasetPair]:
    """The pairs of a dataset, in order.

    Raises:
        ConfigError: when the folder holds no dataset of ours.
    """
    name = format_of(folder)
    if name is None:
        raise ConfigError(f"{folder} holds no dataset; has the run been merged?")
    if name in RANKINGS:
        raise ConfigError(f"{folder} holds answers (format {name}), not pairs")
    texts = TEXTS[name.removesuffix("_jsonl")]
    rows = jsonl_rows(folder) if name.endswith("_jsonl") else parquet_rows(folder)
    for split, row in rows:
        question, chosen, rejected = texts(row)
        yield DatasetPair(
            idx=str(row.get("idx") or ""),
            question=without_marks(question) if marks_are_in_front(question) else question,
            images=tuple(images_of(row, folder)),
            chosen=chosen,
            rejected=rejected,
            chosen_score=row.get("chosen_score"),
            rejected_score=row.get("rejected_score"),
            split=split,
        )


def parquet_rows(folder: Location) -> Iterator[tuple[str, Row]]:
    """Every row of the parts, with its split."""
    import pyarrow.parquet

    for part in parquet_parts(folder):
        with files.open_file(part) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            for row in rows_of(file):
                yield split_of_part(part, folder), row


def jsonl_rows(folder: Location) -> Iterator[tuple[str, Row]]:
    """Every row of the splits' files, with its split."""
    for part in jsonl_parts(folder):
        for row in lines_of(part):
            if row is not None:
                yield split_of_part(part, folder), row


def split_of_part(part: Location, folder: Location) -> str:
    """The split of a file of rows, which its name, or that of its folder, begins with."""
    name = part.name if part.parent == folder or part == folder else part.parent.name
    return "test" if split_named(name) == "test" else "train"


def images_of(row: Row, folder: Location) -> Iterator[EncodedImage]:
    """The pictures of a row: inside it, or files of the folder."""
    images = [row["image"]] if row.get("image") else row.get("images") or []
    for image in images:
        if isinstance(image, str):
            yield EncodedImage(files.read_bytes(folder / image) or b"", image)
        else:
            yield EncodedImage(image["bytes"], image["path"] or "")


def rlaifv_texts(row: Row) -> tuple[str, str, str]:
    return row["question"], row["chosen"], row["rejected"]


def trl_texts(row: Row) -> tuple[str, str, str]:
    question, chosen, rejected = (
        "".join(
            IMAGE_MARK if part["type"] == "image" else part["text"]
            for turn in row[name]
            for part in turn["content"]
        )
        for name in ("prompt", "chosen", "rejected")
    )
    return question, chosen, rejected


def trl_reward_texts(row: Row) -> tuple[str, str, str]:
    (question, chosen), (_, rejected) = row["chosen"], row["rejected"]
    return question["content"], chosen["content"], rejected["content"]


def ms_swift_texts(row: Row) -> tuple[str, str, str]:
    user, assistant = row["messages"]
    return user["content"], assistant["content"], row["rejected_response"]


def llama_factory_texts(row: Row) -> tuple[str, str, str]:
    (human,) = row["conversations"]
    return human["value"], row["chosen"]["value"], row["rejected"]["value"]


TEXTS: dict[str, Callable[[Row], tuple[str, str, str]]] = {
    "rlaifv": rlaifv_texts,
    "trl": trl_texts,
    "trl_reward": trl_reward_texts,
    "ms_swift": ms_swift_texts,
    "llama_factory": llama_factory_texts,
}
"""Row -> question, chosen and rejected answer, by format."""
