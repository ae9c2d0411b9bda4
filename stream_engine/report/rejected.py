"""Records that were rejected when they were read, with what their rows hold: question and pictures.

A rejected record is in no shard, so its row is read again, as the input is now: from files on this
machine only, and not far into them. What cannot be had is left out; the reason is shown all the
same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError, StreamEngineError
from stream_engine.inputs.layouts import Row, mapped, with_question
from stream_engine.inputs.picture_values import pictures_in
from stream_engine.inputs.readers import rows_of
from stream_engine.inputs.rows import idx_of, image_content
from stream_engine.inputs.sources import find_inputs
from stream_engine.inputs.unread import Unread, Unreadable
from stream_engine.records import EncodedImage, Failure, Sample
from stream_engine.report.entries import cut, set_aside_entry
from stream_engine.report.reading import Found
from stream_engine.store.locations import folder_of
from stream_engine.text import describe

logger = logging.getLogger(__name__)

MAX_ROW = 20_000
"""Rows of a file that are passed over to get at a rejected one."""
AT_READING = "input"


def rejected_entries(failures: Sequence[Failure], config: InputConfig) -> Iterator[Found]:
    """An entry for each of these, in their order."""
    rows = {
        source: wanted_rows(source, numbers, config)
        for source, numbers in numbers_by_source(failures).items()
    }
    for number, failure in enumerate(failures):
        row = rows.get(failure.source, {}).get(failure.row)
        if row is not None and failure.idx and idx_of_row(row) != failure.idx:
            row = None  # the input has changed since
        sample = sample_of(failure, number, row, config)
        where = f"{failure.source}, row {failure.row}" if failure.row >= 0 else failure.source
        detail = f"{failure.detail}\n{where}" if failure.detail else where
        yield Found(set_aside_entry(sample, f"{AT_READING}: {failure.reason}", detail), sample)


def numbers_by_source(failures: Sequence[Failure]) -> dict[str, set[int]]:
    """The rows to read again, by the file that they are in."""
    found: dict[str, set[int]] = {}
    for failure in failures:
        if "://" not in failure.source and 0 <= failure.row < MAX_ROW:
            found.setdefault(failure.source, set()).add(failure.row)
    return found


def wanted_rows(source: str, numbers: set[int], config: InputConfig) -> Mapping[int, Row]:
    """These rows of a file under our names, as many as can be read."""
    found: dict[int, Row] = {}
    try:
        [file] = find_inputs(source).files
        for number, row in rows_of(file, config, Unread()):
            if number in numbers and not isinstance(row, RecordError):
                found[number] = named(row, config)
            if number >= max(numbers):
                break
    except (StreamEngineError, Unreadable, OSError, ValueError, pa.ArrowException) as error:
        logger.info("rejected rows of %s are shown without pictures: %s", source, describe(error))
    return found


def named(row: Row, config: InputConfig) -> Row:
    """A row under our names, with the question of a chat where that can be told."""
    row = mapped(row, config.columns)
    try:
        return with_question(row)[0]
    except RecordError:
        return row


def idx_of_row(row: Row) -> str:
    try:
        return idx_of(row)
    except RecordError:
        return ""


def sample_of(failure: Failure, number: int, row: Row | None, config: InputConfig) -> Sample:
    """What can be shown of a rejected row. Its key is made from where it stands, and its pictures:
    those of another report are taken over by it."""
    question, images = "", list[EncodedImage]()
    if row is not None:
        question = row["question"] if isinstance(row.get("question"), str) else ""
        images = list(pictures(row, folder_of(failure.source), config))
    digest = hashlib.blake2b(digest_size=16)
    place = f"{failure.source}\0{failure.row}\0{number}"
    for part in (place.encode(errors="replace"), *(image.data for image in images)):
        digest.update(len(part).to_bytes(8, "little") + part)
    key = digest.hexdigest()
    return Sample(key=key, idx=failure.idx or key, question=cut(question), images=tuple(images))


def pictures(row: Row, folder: str, config: InputConfig) -> Iterator[EncodedImage]:
    """The encoded pictures of a row, those that can be found."""
    try:
        values = pictures_in(row.get("images")) or pictures_in(row.get("image"))
        values = values or pictures_in(row.get("image_path"))
    except RecordError:
        return
    for value in values:
        try:
            yield EncodedImage(*image_content(value, folder, config))
        except (RecordError, OSError):
            continue
