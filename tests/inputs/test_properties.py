"""Properties of reading, whatever the rows, tars and pictures: nothing is lost and nothing raises.

    rows in = samples + rejects by name; no question is asked without a picture that its row names;
    what is kept of a picture decodes, and is seen alike by all

`INPUT_EXAMPLES` is the number of examples of each property (60); with `INPUT_SECONDS` each is run
again and again for as long, and prints how many were tried.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from stream_engine.errors import RecordError
from stream_engine.inputs.readers import InputRow, read_rows
from stream_engine.inputs.unread import Unread
from stream_engine.pictures import read_picture
from stream_engine.records import Failure, Sample, prompt_parts
from stream_engine.run_dir.remedies import REMEDIES
from tests.samples import input_config, picture

SECONDS = float(os.environ.get("INPUT_SECONDS", 0))
EXAMPLES = int(os.environ.get("INPUT_EXAMPLES", 60))

PICTURES = [picture(i, format) for i, format in enumerate(("PNG", "JPEG", "GIF", "WEBP"))]
BASE64 = [base64.b64encode(data).decode() for data in PICTURES]

letters = st.characters(exclude_categories=())  # half surrogates too
texts = st.text(letters, max_size=30) | st.sampled_from(
    ["What?", "<image>\nWhat?", "Is <image> so?", "<image>", "</s>", "a\r\nb\n", "\ufeff", "\x00"]
)
atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | texts
    | st.sampled_from([*BASE64, "a.png", "gone.png", "../a.png", "http://x/a.png", "data:,x"])
)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["bytes", "path", "url", "image", "x"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": values}),
    max_size=3,
)
columns = st.text(letters, max_size=5) | st.sampled_from(
    ["idx", "id", "image", "images", "image_path", "metainfos", "ds_name", "ds_question_id"]
)
rows = st.dictionaries(columns, values, max_size=5).flatmap(
    lambda row: st.fixed_dictionaries(
        {},
        optional={"question": texts | values, "messages": turns | values, "prompt": turns | values},
    ).map(lambda questions: row | questions)
)


def checked(test: Callable[..., None]) -> Callable[..., None]:
    """The settings of every property here; with INPUT_SECONDS, again and again with new seeds."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    test = settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=quiet, database=None
    )(test)
    if not SECONDS:
        return test

    def repeated() -> None:
        end, number = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            seed(number)(test)()
            number += 1
        print(f"{test.__name__}: {number * EXAMPLES} examples")

    return repeated


def read_all(source: Path, **options: Any) -> tuple[list[InputRow], Unread]:
    unread = Unread()
    return list(read_rows(str(source), input_config(**options), unread=unread)), unread


def check_rows(found: list[InputRow]) -> None:
    """Every row is a sample that can be asked, or a reject with a name and a remedy."""
    for row in found:
        if isinstance(row.item, Failure):
            assert row.item.reason in REMEDIES, row.item
            msgspec.json.encode(row.item)
            continue
        sample = row.item
        msgspec.json.encode(sample)
        assert sample.question.strip()
        assert prompt_parts(sample.question, len(sample.images)).count(None) == len(sample.images)
        assert sample.question.count("<image>") in (0, len(sample.images))
        for image in sample.images:
            assert Image.open(io.BytesIO(image.data)).convert("RGB").size > (0, 0)


def names_a_picture(value: Any) -> bool:
    """Whether a cell says something of a picture: anything but nothing."""
    if isinstance(value, dict):
        return any(names_a_picture(part) for part in value.values())
    if isinstance(value, list):
        return any(map(names_a_picture, value))
    return not (value is None or value == "" or value != value)


@checked
@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from(["q.jsonl", "q.json"]))
def test_every_row_is_a_sample_or_a_reject(table: list[dict[str, Any]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(json.dumps(row) + "\n" for row in table)
        text = lines if name == "q.jsonl" else json.dumps(table)
        (Path(folder) / name).write_text(text)
        (Path(folder) / "a.png").write_bytes(PICTURES[0])
        found, unread = read_all(Path(folder) / name)
    assert [row.row for row in found] == list(range(len(table)))
    check_rows(found)
    msgspec.json.encode([list(unread.columns), unread.left_out, unread.examples])
    for given_row, row in zip(table, found, strict=True):
        named = [given_row.get(name) for name in ("image", "images")]
        if isinstance(row.item, Sample) and not row.item.images:
            assert not any(map(names_a_picture, named)), given_row


suffixes = st.sampled_from(["json", "txt", "png", "jpg", "1.png", "heic", "cls", "bin", ""])
members = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "a.v1.0", "x/a", "a.v1.1"]),
        suffixes,
        st.sampled_from([*PICTURES, b'{"question": "What?"}', b"What?", b"\xff", b""]),
        st.sampled_from(["file"] * 8 + ["link"]),
    ),
    min_size=1,
    max_size=8,
)


def tar_of(content: list[tuple[str, str, bytes, str]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, suffix, data, kind in content:
            info = tarfile.TarInfo(f"{key}.{suffix}" if suffix else key)
            if kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "a.png"
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@checked
@given(
    st.lists(members, min_size=1, max_size=2),
    st.none() | st.tuples(st.floats(0, 1), st.sampled_from(["cut", "flip"])),
)
def test_every_member_of_a_tar_is_in_a_sample_or_named(
    archives: list[list[tuple[str, str, bytes, str]]], damage: tuple[float, str] | None
) -> None:
    data = bytearray(b"".join(map(tar_of, archives)))
    if damage is not None:
        place = int(damage[0] * (len(data) - 1))
        if damage[1] == "cut":
            del data[place:]
        else:
            data[place] ^= 0x41
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(data)
        found, unread = read_all(Path(folder) / "a.tar")
    check_rows(found)
    assert found or unread.lines() or damage is not None
    pictures = {data for archive in archives for _, _, data, _ in archive if data in PICTURES}
    for row in found:
        if isinstance(row.item, Sample) and damage is None:
            assert {image.data for image in row.item.images} <= pictures


modes = st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"])
formats = st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])


@checked
@given(modes, formats, st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.binary())
def test_what_is_kept_of_a_picture_is_seen_alike(
    mode: str, format: str, width: int, height: int, orientation: int, noise: bytes
) -> None:
    image = Image.new(mode, (width, height))
    for place, value in enumerate(noise[: width * height]):
        image.putpixel((place % width, place // width), value % (2 if mode == "1" else 256))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, exif=exif)
    except (OSError, ValueError, KeyError, TypeError):
        return  # a form that does not exist
    try:
        stored = read_picture(buffer.getvalue(), 10**6)
    except RecordError as error:
        assert error.reason in REMEDIES
        return
    again = read_picture(stored.data, 10**6)
    assert (again.data, again.changes) == (stored.data, ())
    shown = Image.open(io.BytesIO(stored.data))
    assert getattr(shown, "n_frames", 1) == 1
    assert shown.convert("RGBA").getchannel("A").getextrema() == (255, 255)


@checked
@given(
    st.sampled_from(PICTURES),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
)
def test_no_bytes_stop_the_reading_of_pictures(
    data: bytes, changes: list[tuple[float, int]], share: float
) -> None:
    broken = bytearray(data)
    for place, value in changes:
        broken[int(place * (len(broken) - 1))] = value
    try:
        stored = read_picture(bytes(broken[: int(share * len(broken)) + 1]), 10**6)
    except RecordError as error:
        assert error.reason in REMEDIES
    else:
        Image.open(io.BytesIO(stored.data)).convert("RGB")
