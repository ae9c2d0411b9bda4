"""Every form of a picture in use is read, and any other is a reject by name."""

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from stream_engine.inputs.picture_values import parse_picture
from stream_engine.records import Sample
from tests.inputs.formats import read
from tests.samples import picture, write_jsonl

DATA = picture(1)
BASE64 = base64.b64encode(DATA).decode()
LONG = f"sub/{'x' * 60}/{'y' * 60}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub" / ("x" * 60)).mkdir(parents=True)
    for name in ("a b.png", "noext", "sub/c.png", LONG, unicodedata.normalize("NFD", "café.png")):
        (tmp_path / name).write_bytes(DATA)
    return tmp_path


FORMS: dict[str, Any] = {
    "base64": BASE64,
    "base64-url-safe": base64.urlsafe_b64encode(DATA).decode(),
    "base64-without-padding": BASE64.rstrip("="),
    "base64-lines": base64.encodebytes(DATA).decode(),
    "data-url": f"data:image/png;base64,{BASE64}",
    "data-url-upper-case": f"DATA:image/png;BASE64,{BASE64}",
    "path": "a b.png",
    "path-with-a-newline": "a b.png\n",
    "path-with-dots": "./sub/../a b.png",
    "path-without-suffix": "noext",
    "long-path-without-suffix": LONG,
    "backslashes": "sub\\c.png",
    "composed-accent": unicodedata.normalize("NFC", "café.png"),
    "dict-bytes": {"bytes": BASE64, "path": None},
    "dict-path": {"bytes": None, "path": "a b.png"},
    "dict-url": {"url": "a b.png"},
    "dict-image-url": {"image_url": {"url": f"data:image/png;base64,{BASE64}"}},
    "dict-image": {"image": "a b.png"},
    "dict-base64": {"base64": BASE64},
    "dict-file-name": {"file_name": "a b.png"},
    "json-text": json.dumps({"bytes": BASE64, "path": None}),
    "as-pandas-writes-it": str({"bytes": DATA, "path": "gone.png"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_in_use_is_read(folder: Path, form: str):
    rows = [{"question": "?", "image": FORMS[form]}, {"question": "!", "images": [FORMS[form]]}]
    samples = read(write_jsonl(folder / "q.jsonl", rows), text_only="reject")
    assert [sample.images[0].data for sample in samples] == [DATA, DATA]


@pytest.mark.parametrize("url", ["file://{}/a b.png", "file://{}/a%20b.png", "file:{}/a%20b.png"])
def test_a_file_url_is_read_inside_the_fence(folder: Path, url: str):
    path = write_jsonl(folder / "q.jsonl", [{"question": "?", "image": url.format(folder)}])
    assert isinstance(read(path)[0], Sample)
    assert isinstance(read(path, image_root=str(folder))[0], Sample)
    assert read(path, image_root=str(folder / "sub"))[0].reason == "path_outside_root"


REJECTED: dict[str, tuple[Any, str]] = {
    "web": ("https://example.com/a.png", "remote_image"),
    "other-host": ("file://elsewhere/a.png", "remote_image"),
    "no-such-path": ("gone/picture", "missing_image_file"),
    "no-such-path-with-suffix": ("gone.png", "missing_image_file"),
    "broken-base64": (f"{BASE64[:-9]}*", "missing_image_file"),
    "broken-long-base64": (BASE64 * 100 + "*", "bad_base64"),
    "base64-of-no-picture": (base64.b64encode(b"text " * 50).decode(), "undecodable_image"),
    "number": (7, "unknown_image_form"),
    "true": (True, "unknown_image_form"),
    "pixels": ([[[1, 2, 3]]], "unknown_image_form"),
    "unknown-dict": ({"pixels": 3}, "unknown_image_form"),
    "dict-of-nothing-known": ({"id": None}, "unknown_image_form"),
    "null-among-pictures": ([BASE64, None], "unknown_image_form"),
    "blank-among-pictures": ([BASE64, " "], "unknown_image_form"),
}


@pytest.mark.parametrize("form", REJECTED)
def test_any_other_form_is_rejected_by_name(folder: Path, form: str):
    """With --text_only allow as well: a picture is never left out in silence."""
    value, reason = REJECTED[form]
    path = write_jsonl(folder / "q.jsonl", [json.dumps({"question": "?", "image": value})])
    (failure,) = read(path, text_only="allow")
    assert failure.reason == reason


def test_a_sequence_of_dicts_is_a_list_of_pictures(folder: Path):
    images = {"bytes": [BASE64, None], "path": [None, "noext"]}
    (sample,) = read(write_jsonl(folder / "q.jsonl", [{"question": "?", "images": images}]))
    assert [image.data for image in sample.images] == [DATA, DATA]


@pytest.mark.parametrize("text", ["[a, b]", "{[]: 1}", r"['\d']", "[" * 9000 + "]" * 9000, "{1}"])
def test_brackets_that_hold_no_list_are_a_path(folder: Path, text: str):
    (failure,) = read(write_jsonl(folder / "q.jsonl", [{"question": "?", "image": text}]))
    assert failure.reason in ("missing_image_file", "nested_too_deep", "unknown_image_form")


def test_a_blank_text_is_no_picture(folder: Path):
    path = write_jsonl(folder / "q.jsonl", [{"question": "?", "image": " "}])
    assert read(path, text_only="reject")[0].reason == "no_image"


def test_bytes_in_any_container_are_bytes():
    for value in (DATA, bytearray(DATA), memoryview(DATA)):
        assert parse_picture(value).data == DATA
