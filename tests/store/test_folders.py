"""FolderSwap: a folder appears whole, and what killed processes left goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream_engine.errors import ConfigError
from stream_engine.store.folders import FolderSwap, this_host


def has_stats(folder: Path) -> bool:
    return (folder / "stats.json").is_file()


def fill(folder: Path, text: str) -> None:
    with FolderSwap(folder, has_stats) as swap:
        (swap.new / "stats.json").write_text(text)
        swap.commit()


def test_the_old_folder_stays_until_the_commit(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    fill(folder, "old")
    with FolderSwap(folder, has_stats) as swap:
        (swap.new / "stats.json").write_text("new")
        assert (folder / "stats.json").read_text() == "old"
        swap.commit()
        assert (folder / "stats.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_without_a_commit_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FolderSwap(tmp_path / "dataset", has_stats) as swap:
        (swap.new / "stats.json").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"), FolderSwap(tmp_path, has_stats):
        pass
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "an empty folder may be used")


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("host", "pid", "age_s", "is_removed"),
    [
        pytest.param(None, None, 0, True, id="its-process-is-gone"),
        pytest.param(None, os.getpid(), 0, False, id="its-process-runs"),
        pytest.param("0" * 8, None, 0, False, id="of-another-host-and-young"),
        pytest.param("0" * 8, None, 7200, True, id="of-another-host-and-old"),
    ],
)
def test_abandoned_folders_are_removed(
    tmp_path: Path, host: str | None, pid: int | None, age_s: float, is_removed: bool
) -> None:
    name = f".dataset.{host or this_host()}-{pid or gone_pid()}-0a1b2c3d.new.tmp"
    left = tmp_path / name
    left.mkdir()
    (left / "part-00000.unfinished").write_text("half")
    other = tmp_path / name.replace(".dataset.", ".dataset_trl.")
    other.mkdir()
    for path in (*left.iterdir(), left):
        moment = path.stat().st_mtime - age_s
        os.utime(path, (moment, moment))
    fill(tmp_path / "dataset", "new")
    assert left.exists() != is_removed
    assert other.exists(), "another folder's"
