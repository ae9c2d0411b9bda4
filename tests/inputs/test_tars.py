"""WebDataset tars: keys, members that are pictures, archives that are joined, cut or damaged."""

import base64
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from stream_engine.inputs.readers import read_rows
from stream_engine.inputs.unread import Unread
from stream_engine.records import Failure, Sample
from tests.inputs.formats import read, write_tar, write_webdataset
from tests.samples import input_config, make_row, picture


def test_a_tar_cut_between_a_samples_members_gives_no_half_sample(tmp_path: Path):
    """The question alone would pass as a question without an image."""
    path = write_webdataset(tmp_path / "a.tar", [make_row(i) for i in range(5)])
    with tarfile.open(path) as tar:
        cut = next(member.offset for member in tar if member.name == "00003.png")
    os.truncate(path, cut)
    *samples, failure = read(path)
    assert [sample.idx for sample in samples] == ["0", "1", "2"]
    assert (failure.reason, failure.row) == ("unreadable_file", 3)


def test_members_that_do_not_follow_each_other_are_rejected(tmp_path: Path):
    """WebDataset would make a sample without its image of the first, silently."""
    path = write_tar(
        tmp_path / "a.tar",
        {
            "a.json": b'{"question": "a"}',
            "b.json": b'{"question": "b"}',
            "a.png": picture(1),
            "c.json": b'{"question": "c"}',
            "c.png": picture(2),
        },
    )
    items = read(path)
    assert [getattr(item, "reason", "sample") for item in items] == [
        "scattered_members",
        "sample",
        "scattered_members",
        "sample",
    ]


def test_a_bad_json_member_is_one_reject(tmp_path: Path):
    members = {"a.json": b"{", "a.png": picture(1), "b.txt": b"?", "c.png": picture(2)}
    members["d.txt"] = b"\xff"
    items = read(write_tar(tmp_path / "a.tar", members))
    assert [getattr(item, "reason", "sample") for item in items] == [
        "malformed_json",
        "sample",
        "missing_question",
        "invalid_text",
    ]
    assert [item.row for item in items if isinstance(item, Failure)] == [0, 2, 3]


@pytest.mark.parametrize(
    ("named", "order"),
    [
        (["a.1.png", "a.0.png"], (1, 0)),
        (["1.png", "0.png"], (1, 0)),
        (["x/a.1.png"], (1,)),
        ("a.1.png", (1,)),
        (["a.1.png", "other.png"], (0, 1)),
        (["a.1.png", "a.1.png"], (0, 1)),
    ],
)
def test_the_json_says_which_members_are_its_pictures_and_in_which_order(
    tmp_path: Path, named: object, order: tuple[int, ...]
):
    """They stood in the order of their names, whatever the json said: each mark got another's."""
    members = {f"a.{i}.png": picture(i) for i in (0, 1)}
    members["a.json"] = json.dumps({"question": "?", "images": named}).encode()
    unread = Unread()
    (row,) = read_rows(str(write_tar(tmp_path / "a.tar", members)), input_config(), unread=unread)
    assert [image.data for image in row.item.images] == [picture(i) for i in order]
    assert sum(unread.left_out.values()) == 2 - len(order)


def reasons(path: Path, **settings) -> list[str]:
    return [getattr(item, "reason", "sample") for item in read(path, **settings)]


def question(text: str) -> bytes:
    return json.dumps({"question": text}).encode()


def test_dotted_keys_are_paired_by_the_longest_common_stem(tmp_path: Path):
    """WebDataset takes "cat" for the key of all of these."""
    members = {}
    for i, key in enumerate(("cat.v1.0", "cat.v1.1", "dog.v2.0")):
        members |= {f"{key}.png": picture(i), f"{key}.json": question(key)}
    samples = read(write_tar(tmp_path / "a.tar", members))
    assert [sample.question for sample in samples] == ["cat.v1.0", "cat.v1.1", "dog.v2.0"]
    assert [sample.images[0].data for sample in samples] == [picture(i) for i in range(3)]


def test_numbered_pictures_belong_to_one_text_and_a_caption_to_its_sample(tmp_path: Path):
    members = {f"img.{i}.png": picture(i) for i in (1, 2, 3)}
    members |= {"img.json": question("?"), "img.caption.txt": b"a caption"}
    (sample,) = read(write_tar(tmp_path / "a.tar", members))
    assert [image.data for image in sample.images] == [picture(i) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("suffix", "format"),
    [("jfif", "JPEG"), ("jpe", "JPEG"), ("pgm", "PPM"), ("apng", "PNG"), ("picture", "PNG")],
)
def test_pictures_with_rare_suffixes_are_read(tmp_path: Path, suffix: str, format: str):
    members = {"a.json": question("?"), f"a.{suffix}": picture(1, format)}
    (sample,) = read(write_tar(tmp_path / "a.tar", members))
    assert sample.images[0].data == picture(1, format)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "undecodable_image"),
        ("a.svg", b"<svg/>", "undecodable_image"),
        ("a.bin", b"what is this", "unread_member"),
    ],
)
def test_a_picture_that_cannot_be_read_is_no_question_without_one(
    tmp_path: Path, name: str, data: bytes, reason: str
):
    path = write_tar(tmp_path / "a.tar", {"a.json": question("?"), name: data})
    assert reasons(path, text_only="allow") == [reason]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_pictures_place_is_named(tmp_path: Path, kind: bytes):
    path = write_tar(tmp_path / "a.tar", {"a.png": picture(1), "b.json": question("?")})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, "a.png"
        tar.addfile(link)
    *_, failure = read(path, text_only="allow")
    assert failure.reason == "unread_member"
    assert "b.png -> a.png is a link" in failure.detail


def test_a_picture_in_another_folder_is_named(tmp_path: Path):
    members = {"text/a.json": question("?"), "images/a.png": picture(1)}
    path = write_tar(tmp_path / "a.tar", members)
    assert reasons(path, text_only="allow") == ["unread_member", "missing_question"]


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz", "all.tar.zst", "all.tgz"])
def test_concatenated_tars_are_read_to_the_end(tmp_path: Path, name: str):
    """`cat a.tar b.tar`: the second was passed over, and "ok" was said."""
    parts = []
    for part in range(3):
        rows = [make_row(10 * part + i) for i in range(4)]
        parts.append(write_webdataset(tmp_path / f"{part}.tar", rows).read_bytes())
    if name.endswith((".gz", ".tgz")):
        parts = [gzip.compress(part) for part in parts]
    if name.endswith(".zst"):
        parts = [pa.compress(b"".join(parts), "zstd", asbytes=True)]
    (tmp_path / name).write_bytes(b"".join(parts))
    numbers = [10 * part + i for part in range(3) for i in range(4)]
    assert [sample.idx for sample in read(tmp_path / name)] == list(map(str, numbers))


def test_of_a_member_that_stands_twice_the_last_is_taken_and_it_is_said(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.json", question("?")), ("a.png", picture(1)), ("a.png", picture(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    unread = Unread()
    (row,) = read_rows(str(path), input_config(), unread=unread)
    assert row.item.images[0].data == picture(2)
    assert any("stand twice" in line and "a.png" in line for line in unread.lines())


def test_members_that_belong_to_no_sample_are_counted(tmp_path: Path):
    rows = write_webdataset(tmp_path / "a.tar", [make_row(1), make_row(2)])
    with tarfile.open(rows, "a") as tar:
        for name in ("00000.cls", "notes.md", "more.md"):
            tar.addfile(tarfile.TarInfo(name))
    unread = Unread()
    items = [row.item for row in read_rows(str(rows), input_config(), unread=unread)]
    assert [item.idx for item in items if isinstance(item, Sample)] == ["2"]
    assert unread.left_out == {"members .md without a text": 2}
    assert [item.reason for item in items if isinstance(item, Failure)] == ["scattered_members"] * 2


@pytest.mark.parametrize("number", [0, 5, 9])
def test_a_damaged_header_costs_the_samples_beside_it_alone(tmp_path: Path, number: int):
    path = write_webdataset(tmp_path / "a.tar", [make_row(i) for i in range(10)])
    with tarfile.open(path) as tar:
        offset = tar.getmember(f"{number:05d}.png").offset
    data = bytearray(path.read_bytes())
    data[offset + 10] ^= 0xFF
    path.write_bytes(data)
    items = read(path, text_only="allow")
    whole = [item.idx for item in items if isinstance(item, Sample)]
    assert set(map(str, range(10))) - {str(number), str(number + 1)} <= set(whole)
    assert str(number) not in whole
    assert all(item.images for item in items if isinstance(item, Sample))
    named = {item.reason for item in items if isinstance(item, Failure)}
    assert named == ({"unreadable_file"} if number == 9 else {"damaged_header"})


def test_what_lies_behind_a_tar_is_no_harm(tmp_path: Path):
    path = write_webdataset(tmp_path / "a.tar", [make_row(1)])
    path.write_bytes(path.read_bytes() + b"signature" * 200)
    assert reasons(path) == ["sample"]


def test_suffixes_in_capitals_are_read(tmp_path: Path):
    members = {"a.JPG": picture(1, "JPEG"), "a.JSON": question("a"), "b.Png": picture(2)}
    samples = read(write_tar(tmp_path / "a.tar", {**members, "b.TXT": b"b"}))
    assert [(one.question, len(one.images)) for one in samples] == [("a", 1), ("b", 1)]


def test_a_text_with_a_name_of_its_own_is_not_asked_without_its_picture(tmp_path: Path):
    members = {"a.jpg": picture(1), "a.question.txt": b"?", "b.jpg": picture(2), "b.cls": b"3"}
    items = read(write_tar(tmp_path / "a.tar", members), text_only="allow")
    assert [(item.reason, item.detail) for item in items] == [
        ("missing_question", "a question is in a.json or a.txt; there is a.jpg"),
        ("unread_member", "its picture a.jpg has another key; name the text a.json or .txt"),
        ("missing_question", "a question is in b.json or b.txt; there is b.jpg, b.cls"),
    ]


@pytest.mark.parametrize("text_only", ["allow", "reject"])
def test_a_text_is_not_asked_where_only_numbers_tell_its_pictures_apart(
    tmp_path: Path, text_only: str
):
    """a-0.jpg and a-1.jpg were rejected, and a.json was asked as text."""
    members = {"a-0.jpg": picture(1), "a-1.jpg": picture(2), "a.json": question("a")}
    others = {"b-1.jpg": picture(3), "b-1.json": question("c"), "b.json": question("d")}
    items = read(write_tar(tmp_path / "a.tar", {**members, **others}), text_only=text_only)
    assert [getattr(item, "reason", "sample") for item in items] == [
        *("missing_question", "missing_question", "unread_member", "sample"),
        "sample" if text_only == "allow" else "no_image",
    ]
    assert items[2].detail.endswith(
        "keys of their own, a-1.*; put a dot before the number: a.0.jpg"
    )


def test_what_macos_adds_is_passed_over_and_told(tmp_path: Path):
    """Its "._a.jpg" stands between "a.jpg" and "a.json", which looked scattered then."""
    members = {"._a.png": b"mac", "a.png": picture(1), "._a.json": b"mac", "a.json": question("a")}
    path = write_tar(tmp_path / "a.tar", {**members, "__MACOSX/a.png": picture(2)})
    unread = Unread()
    (row,) = read_rows(str(path), input_config(), unread=unread)
    assert isinstance(row.item, Sample) and row.item.images[0].data == picture(1)
    assert unread.left_out == {"members that macOS adds": 3}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "where/it/came/from.png"}, "sample"),
        ({"image": base64.b64encode(picture(1)).decode()}, "sample"),
        ({"image": base64.b64encode(picture(2)).decode()}, "two_pictures"),
        ({"images": ["one.png", "two.png"]}, "unread_member"),
    ],
)
def test_a_picture_that_the_json_holds_or_names_besides_is_not_lost(
    tmp_path: Path, row: dict, reason: str
):
    members = {"a.json": json.dumps({"question": "?", **row}).encode(), "a.png": picture(1)}
    assert reasons(write_tar(tmp_path / "a.tar", members)) == [reason]


def test_a_prompt_in_the_json_goes_before_a_txt(tmp_path: Path):
    members = {"a.json": b'{"prompt": "asked"}', "a.png": picture(1), "a.txt": b"a caption"}
    (sample,) = read(write_tar(tmp_path / "a.tar", members))
    assert sample.question == "asked"


def test_an_archive_behind_padding_of_any_length_is_read(tmp_path: Path):
    paths = [write_webdataset(tmp_path / f"{i}.tar", [make_row(i)]) for i in (0, 1)]
    joined = tmp_path / "all.tar"
    joined.write_bytes((b"\0" * 100).join(path.read_bytes() for path in paths))
    assert [sample.idx for sample in read(joined)] == ["0", "1"]


def test_keys_that_begin_with_another_key_are_samples_of_their_own(tmp_path: Path):
    """Their pictures were merged into the first one's, and their questions left out."""
    members = {}
    for i, key in enumerate(("cat", "cat.1", "cat.2")):
        members |= {f"{key}.png": picture(i), f"{key}.json": question(key)}
    samples = read(write_tar(tmp_path / "a.tar", dict(sorted(members.items(), key=by_key))))
    assert sorted((one.question, one.images[0].data) for one in samples) == [
        (key, picture(i)) for i, key in enumerate(("cat", "cat.1", "cat.2"))
    ]


def by_key(member: tuple[str, bytes]) -> str:
    return member[0].rpartition(".")[0]


@pytest.mark.parametrize("name", ["A.png", "e\u0301.png", "images/a.png"])
def test_a_picture_under_a_key_that_only_looks_the_same_is_named(tmp_path: Path, name: str):
    text = "a.json" if "a" in name.lower() else "\u00e9.json"
    path = write_tar(tmp_path / "a.tar", {name: picture(1), text: question("?")})
    assert reasons(path, text_only="allow") == ["missing_question", "unread_member"]


def test_an_empty_picture_is_not_looked_for_beside_the_tar(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture(2))
    path = write_tar(tmp_path / "a.tar", {"a.png": b"", "a.json": question("?")})
    assert reasons(path) == ["undecodable_image"]
