"""Rows of foreign formats become Samples here, once; nothing after this sees a foreign name.

A row is a dict with the columns of any of the formats:

    idx | question_id            the id; numbers become strings, 7.0 becomes "7"; none: the key
    question                     the text
    image | images               {"bytes", "path"}, raw bytes, base64 or a path, or a list of these
    image_path                   read where the row has no image; then metainfos' image_path
    ds_name origin_dataset origin_split image_path metainfos        carried through, as text
    ds_question_id               kept in metainfos
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.images import decode_base64, read_image_file
from stream_engine.pictures import read_picture
from stream_engine.records import EncodedImage, Sample, sample_key
from stream_engine.run_dir.shards import UNKNOWN_EXTENSION, image_extension

Row = dict[str, Any]

FILE_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}$")
MAX_PATH = 4096
MAX_BARE_PATH = 100
"""Of a path without a suffix, which could be base64 as well: RLAIF-V's limit."""

COLUMNS = frozenset(
    (
        *("idx", "question_id", "question", "image", "images", "image_path", "ds_name"),
        *("origin_dataset", "origin_split", "metainfos", "ds_question_id"),
    )
)

KNOWN_COLUMNS = COLUMNS | {"key", "image_paths"}
"""With what the shards of a run say besides, which another run that reads them makes anew."""
IMAGE_COLUMNS = ("image", "images", "image_path")


def to_sample(row: Row, folder: str, config: InputConfig) -> Sample:
    """Convert a row of a file in `folder`.

    Raises:
        RecordError: with the reason, when the row cannot become a sample.
    """
    question = question_of(row)
    images = images_of(row, folder, config)
    idx = idx_of(row)
    content_key = sample_key("", question, images)
    if idx == content_key:
        idx = ""  # a sample of another run, which had no id there either
    key = sample_key(idx, question, images) if idx else content_key
    return Sample(
        key=key,
        idx=idx or key,
        question=question,
        images=images,
        ds_name=text_of(row.get("ds_name")),
        origin_dataset=text_of(row.get("origin_dataset")),
        origin_split=text_of(row.get("origin_split")),
        image_path=text_of(row.get("image_path")),
        metainfos=metainfos_of(row),
    )


def question_of(row: Row) -> str:
    """The question, which must be text with something in it."""
    question = row.get("question")
    if is_missing(question):
        raise RecordError("missing_question")
    if not isinstance(question, str):
        raise RecordError("invalid_question", f"{type(question).__name__} instead of text")
    if not question.strip():
        raise RecordError("empty_question")
    check_unicode(question)
    return question


def idx_of(row: Row) -> str:
    """The user's id as a string; empty when the row has none."""
    for name in ("idx", "question_id"):
        value = row.get(name)
        if is_missing(value):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas stores a column of integers with gaps as floats
        idx = text_of(value)
        if idx:
            return idx
    return ""


def images_of(row: Row, folder: str, config: InputConfig) -> tuple[EncodedImage, ...]:
    """The row's images, each decoded once as a check; `image_path` stands in for none."""
    default_path = row.get("image_path")
    if is_missing(default_path) or default_path == "":
        default_path = metainfos_path(row)
    values = as_list(row.get("images")) or as_list(row.get("image"))
    if not values:
        values = [{"path": path} for path in as_list(default_path)]
    images = []
    for value in values:
        data, path = image_content(value, folder, config)
        if not path and isinstance(default_path, str):
            path = default_path
        images.append(EncodedImage(read_picture(data, config.max_image_pixels).data, path))
    return tuple(images)


def metainfos_path(row: Row) -> Any:
    """The image_path within metainfos, which may be a dict or its JSON text."""
    metainfos = row.get("metainfos")
    if isinstance(metainfos, str) and "image_path" in metainfos:
        try:
            metainfos = json.loads(metainfos)
        except (ValueError, RecursionError):
            return None
    return metainfos.get("image_path") if isinstance(metainfos, dict) else None


def image_content(value: Any, folder: str, config: InputConfig) -> tuple[bytes, str]:
    """The encoded bytes and the path of one image in any of its forms."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), ""
    if isinstance(value, str) and names_file(value):
        value = {"path": value}
    if isinstance(value, str):
        return decode_base64(value), ""
    if isinstance(value, dict):
        data, path = value.get("bytes"), text_of(value.get("path"))
        if isinstance(data, str) and data:
            return decode_base64(data), path
        if data:
            return image_content(data, folder, config)[0], path
        if path:
            data = read_image_file(path, folder, config.image_root, config.max_image_pixels)
            return data, path
    raise RecordError("undecodable_image", f"{type(value).__name__} is no image")


def names_file(text: str) -> bool:
    """Whether a text in an image's place is a path: it ends in a suffix, or is short with a slash.

    Base64 has no dots, but slashes, and that of the smallest pictures is as short as a path.
    """
    if text.startswith("data:") or len(text) > MAX_PATH:
        return False
    if FILE_SUFFIX.search(text):
        return True
    return "/" in text and len(text) <= MAX_BARE_PATH and not holds_image(text)


def holds_image(text: str) -> bool:
    """Whether a text is base64 that begins as images do."""
    try:
        return image_extension(decode_base64(text)) != UNKNOWN_EXTENSION
    except RecordError:
        return False


def as_list(value: Any) -> list[Any]:
    """A value, a list of values, or nothing, as a list.

    Empty stand-ins for "no image" are nothing, as is a list of such alone; among images they stay,
    to be rejected.
    """
    if isinstance(value, (list, tuple)):
        return [] if all(map(is_nothing, value)) else list(value)
    return [] if is_nothing(value) else [value]


def is_nothing(value: Any) -> bool:
    """Whether a value says that there is no image: null, an empty text, a dict of these."""
    if is_missing(value):
        return True
    if isinstance(value, dict):
        return value.get("bytes") in (None, "") and not value.get("path")
    return isinstance(value, (str, bytes)) and not value


def metainfos_of(row: Row) -> str:
    """The metainfos column as JSON text, with ds_question_id inside."""
    metainfos = text_of(row.get("metainfos"))
    ds_question_id = row.get("ds_question_id")
    if is_missing(ds_question_id):
        return metainfos
    try:
        content = json.loads(metainfos) if metainfos else {}
    except ValueError:
        content = metainfos
    if not isinstance(content, dict):
        content = {"metainfos": content}
    return text_of({**content, "ds_question_id": ds_question_id})


def text_of(value: Any) -> str:
    """Text as it is, nothing as "", dicts, lists and numbers as JSON."""
    if is_missing(value):
        return ""
    if isinstance(value, (dict, list, bool, int, float)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    value = str(value)
    check_unicode(value)
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: absent, null, or the NaN that pandas writes for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_unicode(text: str) -> None:
    """Refuse half surrogate pairs, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError("invalid_text", str(error)) from error
