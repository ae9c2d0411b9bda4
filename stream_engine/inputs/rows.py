"""Rows of foreign formats become Samples here, once; nothing after this sees a foreign name.

A row is a dict with the columns of any of the formats (others by --columns, see layouts.py):

    idx | question_id | id       the id; numbers become strings, 7.0 becomes "7"; none: the key
    question                     the text; else the first user's turn of conversations, messages
                                 or prompt
    image | images               a picture in any of the forms of picture_values.py, or a list
    image_path                   read where the row has no image; then metainfos' image_path, then
                                 image_paths, then file_name
    ds_name origin_dataset origin_split image_path metainfos        carried through, as text
    ds_question_id               kept in metainfos
    answers; chosen, rejected    answers to be scored in place of sampled ones; see answers.py
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Iterator
from typing import Any, NamedTuple

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.answers import ANSWER_COLUMNS, answers_of
from stream_engine.inputs.cells import is_missing, text_of
from stream_engine.inputs.images import read_image_file
from stream_engine.inputs.layouts import CHAT_COLUMNS, CONTEXT_COLUMNS, Row, with_question
from stream_engine.inputs.picture_values import parse_picture, pictures_in
from stream_engine.inputs.questions import (
    FOREIGN_MARK,
    foreign_mark,
    question_of,
    with_pictures_placed,
)
from stream_engine.pictures import read_picture
from stream_engine.records import MEDIA_MARKS, EncodedImage, Sample, sample_key

ID_COLUMNS = ("idx", "question_id", "id")
IMAGE_COLUMNS = ("image", "images", "image_path")
MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
"""What nobody is asked about; see `refuse_media`."""
NAMES_ALONE = ("missing_image_file", "remote_image", "path_outside_root", "unknown_image_form")
"""Of what `image` is where `images` holds the pictures, and `image` tells whence they came."""
PICTURE_FILES = ("image_paths", "file_name")
"""Where the row has no other picture."""
CARRIED_COLUMNS = ("ds_name", "origin_dataset", "origin_split", "metainfos", "ds_question_id")
COLUMNS = frozenset(
    (
        *(*ID_COLUMNS, "question", *IMAGE_COLUMNS, *CARRIED_COLUMNS, *CHAT_COLUMNS),
        *ANSWER_COLUMNS,
    )
)
LOOKED_AT = COLUMNS | {*CONTEXT_COLUMNS, *MEDIA_COLUMNS, *PICTURE_FILES}
"""With those whose rows are refused where they hold something that is needed."""
KNOWN_COLUMNS = COLUMNS | {
    *("key", *PICTURE_FILES, "logps"),
    *("chosen_score", "rejected_score", "margin", "round"),
}
"""With what the shards and the datasets of a run say besides, which is made anew."""


class ReadRow(NamedTuple):
    """A sample, and what was done to its row on the way, by name (a picture's CHANGES, turns)."""

    sample: Sample
    notes: tuple[str, ...]


def to_sample(row: Row, folder: str, config: InputConfig) -> ReadRow:
    """Convert a row of a file in `folder`, under our names.

    Raises:
        RecordError: with the reason, when the row cannot become a sample.
    """
    row, notes = with_question(row, pairs=config.given_answers == "pairs")
    question = question_of(row.get("question"))
    images = images_of(row, folder, config, notes)
    refuse_media(row, question, len(images))
    question = with_pictures_placed(question, len(images))
    notes += [FOREIGN_MARK] if images and foreign_mark(question) else []
    if not images and config.text_only == "reject":
        raise RecordError("no_image", "the row has no picture; --text_only allow asks it as it is")
    answers = answers_of(row, config, notes)
    idx = idx_of(row)
    content_key = sample_key("", question, images, answers)
    if idx == content_key:
        idx = ""  # a sample of another run, which had no id there either
    key = sample_key(idx, question, images, answers) if idx else content_key
    sample = Sample(
        key=key,
        idx=idx or key,
        question=question,
        images=images,
        answers=answers,
        ds_name=text_of(row.get("ds_name"), "ds_name"),
        origin_dataset=text_of(row.get("origin_dataset"), "origin_dataset"),
        origin_split=text_of(row.get("origin_split"), "origin_split"),
        image_path=text_of(row.get("image_path"), "image_path"),
        metainfos=metainfos_of(row),
    )
    return ReadRow(sample, tuple(dict.fromkeys(notes)))


def idx_of(row: Row) -> str:
    """The user's id as a string; empty when the row has none."""
    for name in ID_COLUMNS:
        value = row.get(name)
        if is_missing(value):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas stores a column of integers with gaps as floats
        idx = text_of(value, name)
        if idx:
            return idx
    return ""


def images_of(
    row: Row, folder: str, config: InputConfig, notes: list[str]
) -> tuple[EncodedImage, ...]:
    """The row's pictures, each decoded once as a check; `image_path` stands in for none.

    What was done to them is added to the notes.
    """
    default_path = row.get("image_path")
    if is_missing(default_path) or default_path == "":
        default_path = metainfos_path(row)
    values, others = pictures_in(row.get("images")), pictures_in(row.get("image"))
    if not values:
        values, others = others, []
    values = values or pictures_in(default_path) or pictures_in(row.get("image_paths"))
    values = values or pictures_in(picture_file(row))
    contents = [image_content(value, folder, config) for value in values]
    others = [other for other in others if other not in values]  # which are read already
    if others and not set(contents_there(others, folder, config)) <= {d for d, _ in contents}:
        raise RecordError("two_pictures", "image holds a picture that images does not")
    images = []
    for data, path in contents:
        if not path and isinstance(default_path, str):
            path = default_path
        picture = read_picture(data, config.max_image_pixels)
        notes += picture.changes
        images.append(EncodedImage(picture.data, path))
    return tuple(images)


def picture_file(row: Row) -> str | None:
    """The picture that metadata.jsonl names, in a folder of pictures as `datasets` reads it."""
    name = row.get("file_name")
    kind = mimetypes.guess_type(name)[0] if isinstance(name, str) else None
    return name if kind is not None and kind.startswith("image/") else None


def refuse_media(row: Row, question: str, num_images: int) -> None:
    """Raise RecordError for a question about a video or a sound, which would be asked without."""
    held = [name for name in MEDIA_COLUMNS if row.get(name) and not is_missing(row[name])]
    if held and (not num_images or any(mark in question for mark in MEDIA_MARKS)):
        raise RecordError("unsupported_content", f"the row asks about its {held[0]}")


def contents_there(values: list[Any], folder: str, config: InputConfig) -> Iterator[bytes]:
    """The encoded bytes of those values that are pictures at hand; the others are names."""
    for value in values:
        try:
            yield image_content(value, folder, config)[0]
        except RecordError as error:
            if error.reason not in NAMES_ALONE:
                raise


def image_content(value: Any, folder: str, config: InputConfig) -> tuple[bytes, str]:
    """The encoded bytes and the path of one picture in any of its forms."""
    found = parse_picture(value)
    if found.data is not None:
        return found.data, found.path
    try:
        data = read_image_file(
            found.path,
            folder,
            config.image_root,
            config.max_image_pixels,
            follow_links=config.follow_links,
        )
    except RecordError as error:
        if found.may_be_base64 and error.reason == "missing_image_file":
            raise RecordError(
                "undecodable_image", "base64, but of no known picture; no file has that name either"
            ) from error
        raise
    return data, found.path


def metainfos_path(row: Row) -> Any:
    """The image_path within metainfos, which may be a dict or its JSON text."""
    metainfos = row.get("metainfos")
    if isinstance(metainfos, str) and "image_path" in metainfos:
        try:
            metainfos = json.loads(metainfos)
        except (ValueError, RecursionError):
            return None
    return metainfos.get("image_path") if isinstance(metainfos, dict) else None


def metainfos_of(row: Row) -> str:
    """The metainfos column as JSON text, with ds_question_id inside."""
    metainfos = text_of(row.get("metainfos"), "metainfos")
    ds_question_id = row.get("ds_question_id")
    if is_missing(ds_question_id):
        return metainfos
    try:
        content = json.loads(metainfos) if metainfos else {}
    except RecursionError as error:
        raise RecordError("invalid_text", f"metainfos: {error}") from error
    except ValueError:
        content = metainfos
    if not isinstance(content, dict):
        content = {"metainfos": content}
    return text_of({**content, "ds_question_id": ds_question_id}, "metainfos")
