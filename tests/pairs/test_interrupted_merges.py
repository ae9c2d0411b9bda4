"""Merges that are killed or stopped at any file: the old dataset stands or the new one, whole."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from stream_engine.errors import ChangedError
from stream_engine.outputs.validate import validate
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import run_merge

MERGE_UNTIL = """
import os, signal, sys
from stream_engine.outputs.publication import Publication
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import run_merge
count, put = 0, Publication.put
def ending(function):
    def call(*arguments, **options):
        global count
        count += 1
        if count == int(sys.argv[2]):
            print("there", flush=True)
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        return function(*arguments, **options)
    return call
def watched(self, *arguments, **options):
    for name in ("replace", "link", "symlink", "rename", "unlink"):
        setattr(os, name, ending(getattr(os, name)))
    put(self, *arguments, **options)
Publication.put = watched
run_merge(RunDir(sys.argv[1]), rank=2)
"""


def merge_until(run_dir: RunDir, step: int, signal_name: str) -> subprocess.Popen[str]:
    """A merge of other settings that ends, or stops, before its n-th change of a file."""
    words = [sys.executable, "-c", MERGE_UNTIL, str(run_dir.root), str(step), signal_name]
    return subprocess.Popen(
        words,
        cwd=Path(__file__).parents[2],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def merge_in_spite(run_dir: RunDir, **settings: int) -> None:
    """Merge, and again when that finished what another process had begun."""
    while True:
        try:
            run_merge(run_dir, **settings)
            return
        except ChangedError:
            continue


def named_by_the_card(folder: Path) -> dict[str, bytes]:
    """What `load_dataset` reads."""
    (pattern,) = re.findall(r"path: (train\S+)", (folder / "README.md").read_text())
    found = {path.name: path.read_bytes() for path in folder.glob(pattern)}
    assert found, pattern
    return found


def test_a_merge_killed_at_any_file_leaves_the_old_or_the_new_dataset(run_dir: RunDir) -> None:
    for rank in (2, 1):
        run_merge(run_dir, rank=rank)
        copy = shutil.copytree(run_dir.dataset_dir, run_dir.root.parent / f"rank-{rank}")
    old, new = (named_by_the_card(run_dir.root.parent / name) for name in ("rank-1", "rank-2"))
    assert old != new and copy.name == "rank-1"
    seen: list[str] = []
    for step in range(1, 100, 4):
        process = merge_until(run_dir, step, "SIGKILL")
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
        there = named_by_the_card(run_dir.dataset_dir)
        assert there in (old, new), step
        seen.append("old" if there == old else "new")
        if process.returncode == 0:
            break
        merge_in_spite(run_dir, rank=3, distance=50)
        merge_in_spite(run_dir, rank=1)
        assert named_by_the_card(run_dir.dataset_dir) == old and validate(run_dir.dataset_dir) == []
        assert len(list(run_dir.dataset_dir.glob("train-0*"))) == 1, "old rows are removed"
        assert not list(run_dir.root.glob(".*.tmp")), "what the killed merge left is removed"
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"} and len(seen) > 3


def test_a_merge_that_was_stopped_puts_no_older_dataset_over_a_newer_one(run_dir: RunDir) -> None:
    """A process that was stopped for longer than its lease woke up, and swapped its dataset in."""
    run_merge(run_dir, rank=1)
    ends: list[str] = []
    for step in range(1, 100, 4):
        process = merge_until(run_dir, step, "SIGSTOP")
        assert process.stdout is not None
        if process.stdout.readline() != "there\n":
            process.communicate()
            break
        merge_in_spite(run_dir, rank=3, distance=50)
        newer = named_by_the_card(run_dir.dataset_dir)
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate()
        assert named_by_the_card(run_dir.dataset_dir) == newer, (step, error)
        run_merge(run_dir, rank=3, distance=50)
        assert validate(run_dir.dataset_dir) == [], step
        assert process.returncode == 0 or "another process has written it" in error, error
        ends.append("done" if process.returncode == 0 else "refused")
        run_merge(run_dir, rank=1)
    assert ends[0] == "refused" and len(ends) > 3


def test_a_first_merge_killed_at_any_file_is_done_again(run_dir: RunDir) -> None:
    """Its rows stood in a folder without a record, which each later merge refused."""
    for step in range(1, 100, 7):
        process = merge_until(run_dir, step, "SIGKILL")
        process.communicate()
        merge_in_spite(run_dir, rank=2)
        assert validate(run_dir.dataset_dir) == [], step
        shutil.rmtree(run_dir.dataset_dir)
        if process.returncode == 0:
            break
    assert step > 10
