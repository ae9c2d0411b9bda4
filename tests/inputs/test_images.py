import base64
import errno
import os
import time
from pathlib import Path

import pytest

from stream_engine.errors import ConfigError, RecordError
from stream_engine.inputs import images as images_module
from stream_engine.inputs.images import read_image_file
from stream_engine.inputs.picture_values import decode_base64
from stream_engine.inputs.readers import read_samples
from stream_engine.store.transient import WAITS_S
from tests.samples import input_config, picture, write_jsonl


def reason_of(call, *arguments) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    return caught.value.reason


def test_base64_with_prefix_and_line_breaks_is_read():
    text = base64.encodebytes(picture(1)).decode()
    assert decode_base64(text) == picture(1)
    assert decode_base64(f"data:image/png;base64,{text}") == picture(1)


@pytest.mark.parametrize("text", ["not base64!", "abcde", "QUJD*EFG", "ümlaut=="])
def test_broken_base64_is_named(text: str):
    assert reason_of(decode_base64, text) == "bad_base64"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A folder of rows, with an image root in it, and a secret beside the root."""
    root = tmp_path / "rows/images"
    root.mkdir(parents=True)
    (root / "a.png").write_bytes(b"inside")
    (tmp_path / "rows/secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "rows/secret.png")
    (root / "good-link.png").symlink_to(root / "a.png")
    (root / "out").symlink_to(tmp_path / "rows")
    (tmp_path / "rows/images-2").mkdir()
    (tmp_path / "rows/images-2/b.png").write_bytes(b"secret")
    return str(tmp_path / "rows"), str(root)


def read(path: str, folder: str, root: str | None, max_pixels: int = 10**6) -> bytes:
    return read_image_file(path, folder, root, max_pixels)


def test_a_root_that_is_no_folder_is_refused_before_any_row(folders, tmp_path: Path):
    """Each row was rejected, one by one, for a slip in one flag."""
    _, root = folders
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "?", "image_path": "a.png"}])
    for wrong in (f"{root}/nowhere", f"{root}/a.png"):
        with pytest.raises(ConfigError, match="image_root"):
            list(read_samples(str(path), input_config(image_root=wrong)))


def test_paths_inside_the_root_are_read(folders):
    folder, root = folders
    for path in ("a.png", "images/a.png", "good-link.png", "out/images/a.png", f"{root}/a.png"):
        assert read(path, folder, root) == b"inside"


@pytest.mark.parametrize("path", ["a%20b.jpg", "a b.JPG", " a%20b.JPG\n", "~/rows/images/a b.jpg"])
def test_paths_are_found_as_other_systems_write_them(folders, monkeypatch, path: str):
    folder, root = folders
    monkeypatch.setenv("HOME", os.path.dirname(folder))
    Path(root, "a b.jpg").write_bytes(b"spaced")
    assert read(path, folder, root) == b"spaced"


@pytest.mark.parametrize("path", ["%2e%2e/secret.png", "~/rows/secret.png", "../SECRET.PNG"])
def test_no_way_of_writing_a_path_leaves_the_root(folders, monkeypatch, path: str):
    folder, root = folders
    monkeypatch.setenv("HOME", os.path.dirname(folder))
    with pytest.raises(RecordError, match=r"path_outside_root|missing_image_file"):
        read(path, folder, root)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "secret.png",
        "link.png",
        "images/link.png",
        "out/secret.png",
        "../images-2/b.png",
        "images-2/b.png",
        "/etc/hostname",
        "../../../../../../../../etc/hostname",
        "../no-such-file.png",
    ],
)
def test_paths_that_leave_the_root_are_rejected(folders, path: str):
    folder, root = folders
    assert reason_of(read, path, folder, root) == "path_outside_root"


def test_a_link_out_of_the_root_is_named_with_the_flag_that_allows_it(folders, tmp_path: Path):
    """`images/coco -> /disk2` was said to be "not inside", where it plainly lies."""
    folder, root = folders
    for path, link in (("link.png", "link.png"), ("out/secret.png", "out")):
        with pytest.raises(RecordError) as caught:
            read(path, folder, root)
        assert f"{root}/{link} is a link to {tmp_path}" in caught.value.detail
        assert "--follow_links" in caught.value.detail
        assert read_image_file(path, folder, root, 10**6, follow_links=True) == b"secret"


@pytest.mark.parametrize("path", ["../secret.png", "out/../secret.png", "/etc/hostname"])
def test_following_links_opens_no_other_way_out(folders, path: str):
    folder, root = folders
    with pytest.raises(RecordError) as caught:
        read_image_file(path, folder, root, 10**6, follow_links=True)
    assert caught.value.reason in ("path_outside_root", "missing_image_file")


def test_a_path_from_where_one_runs_gets_the_hint(folders, monkeypatch, tmp_path: Path):
    """RLAIF-V's own example has paths that start from the folder it is run from."""
    folder, _ = folders
    (tmp_path / "here/pictures").mkdir(parents=True)
    (tmp_path / "here/pictures/a.png").write_bytes(b"here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RecordError) as caught:
        read("pictures/a.png", folder, None)
    assert "--image_root ." in caught.value.detail
    assert read("pictures/a.png", folder, ".") == b"here"


def test_without_a_root_paths_may_point_anywhere(folders, tmp_path: Path):
    folder, root = folders
    assert read("secret.png", folder, None) == b"secret"
    assert read("../rows/secret.png", folder, None) == b"secret"
    assert read(f"{root}/link.png", folder, None) == b"secret"


@pytest.mark.parametrize("path", ["no.png", "a.png/b.png", "x" * 300, "a\0b.png", "."])
def test_files_that_are_not_there_are_missing(folders, path: str):
    _, root = folders
    assert reason_of(read, path, root, root) == "missing_image_file"
    assert reason_of(read, path, root, None) == "missing_image_file"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited; no time passes."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_an_image_that_cannot_be_reached_now_is_tried_again(folders, waits, monkeypatch, code):
    """A disk that stumbled made `missing_image_file` of pictures that were there."""
    folder, root = folders
    read_file, failures = images_module.read_regular_file, [OSError(code, os.strerror(code))] * 2

    def stumbling(path: str, max_bytes: int) -> bytes:
        if failures:
            raise failures.pop()
        return read_file(path, max_bytes)

    monkeypatch.setattr(images_module, "read_regular_file", stumbling)
    assert read("a.png", folder, root) == b"inside"
    assert waits == list(WAITS_S[:2])
    failures += [OSError(code, os.strerror(code))] * 9
    with pytest.raises(RecordError, match=r"a\.png: .*retry-failed") as caught:
        read("a.png", folder, root)
    assert caught.value.reason == "unreachable_image"


def test_an_image_that_is_not_there_is_not_waited_for(folders, waits):
    folder, root = folders
    assert reason_of(read, "no.png", folder, root) == "missing_image_file"
    assert waits == []


def test_a_pipe_is_not_waited_for(folders):
    folder, root = folders
    os.mkfifo(f"{root}/pipe.png")
    assert reason_of(read, "pipe.png", folder, root) == "missing_image_file"


def test_a_huge_file_is_refused_before_it_is_read(folders):
    folder, root = folders
    with open(f"{root}/huge.png", "wb") as file:
        file.truncate(10**12)
    assert reason_of(read, "huge.png", folder, root) == "image_too_large"
