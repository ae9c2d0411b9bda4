import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream_engine.store.atomic import (
    atomic_writer,
    is_temporary,
    remove_leftovers,
    temporary_path,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_makes_folders_and_leaves_only_the_target(tmp_path: Path):
    write_atomic(tmp_path / "a/b/file.json", b"data")
    assert (tmp_path / "a/b/file.json").read_bytes() == b"data"
    assert names(tmp_path / "a/b") == ["file.json"]


def test_target_keeps_its_content_until_the_block_ends(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_writer(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        write_atomic(path, b"new")
        assert reader.read() == b"old"


def test_an_error_leaves_the_target_as_it_was(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_writer(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_killed_writer_leaves_a_recognisable_leftover_only(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = (
        "import os, sys; from stream_engine.store.atomic import atomic_writer\n"
        "with atomic_writer(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert path.read_bytes() == b"old"
    (leftover,) = (entry for entry in tmp_path.iterdir() if entry != path)
    assert is_temporary(leftover)
    assert not is_temporary(path)
    assert remove_leftovers(tmp_path, older_than_s=0) == 1
    assert names(tmp_path) == ["file"]


def test_young_leftovers_and_other_files_are_kept(tmp_path: Path):
    young, old = temporary_path(tmp_path / "x"), temporary_path(tmp_path / "x")
    for path in (young, old, tmp_path / "x"):
        path.write_bytes(b"")
        os.utime(path, (1, 1))
    os.utime(young)
    assert remove_leftovers(tmp_path, older_than_s=60) == 1
    assert names(tmp_path) == sorted([young.name, "x"])
    assert remove_leftovers(tmp_path / "missing") == 0


def test_files_are_made_with_the_users_own_permissions(tmp_path: Path):
    """Temporary files are often 0600, which locks out the other users of a shared folder."""
    write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
