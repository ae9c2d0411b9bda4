import os
import tarfile
from pathlib import Path

from stream_engine.records import Failure
from tests.inputs.formats import read, write_tar, write_webdataset
from tests.samples import make_row, picture


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
