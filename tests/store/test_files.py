"""Files of a run on a disk: created where there is none, replaced where nothing has changed."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stream_engine.errors import ChangedError
from stream_engine.store import files, local
from stream_engine.store.local import is_temporary, remove_leftovers, temporary_path
from tests.store.publishing import count_in_threads, publish_in_spite

PUBLISH = """
import os, signal, sys
from pathlib import Path
from stream_engine.store import files, local
path, step, version, text = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
count = 0
def stopping(function, name):
    def call(*arguments, **options):
        global count
        count += 1
        if count == step:
            print("stopped before", name, flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **options)
    return call
for name in ("link", "symlink", "rename", "readlink", "fsync", "utime", "stat", "unlink"):
    setattr(os, name, stopping(getattr(os, name), name))
try:
    files.replace(path, text.encode(), version or None)
    print("done", flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(path: Path, step: int, version: str, text: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH, str(path), str(step), version, text],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_file_is_created_once_and_its_folders_with_it(tmp_path: Path):
    path = tmp_path / "a/b/file.json"
    version = files.create(path, b"data")
    assert (path.read_bytes(), names(path.parent)) == (b"data", ["file.json"])
    assert files.stat(path).version == version
    with pytest.raises(ChangedError, match=r"file\.json"):
        files.create(path, b"other")
    assert (path.read_bytes(), names(path.parent)) == (b"data", ["file.json"])


def test_a_file_is_replaced_over_the_version_that_was_read_and_no_other(tmp_path: Path):
    path = tmp_path / "file"
    versions = [files.create(path, b"0")]
    for i in range(1, 50):  # of equal size, and as fast as can be
        versions.append(files.replace(path, b"%d" % (i % 10), versions[-1], durable=False))
    assert len(set(versions)) == 50
    for stale in (*versions[:-1], None):
        with pytest.raises(ChangedError):
            files.replace(path, b"x", stale)
    assert (path.read_bytes(), names(tmp_path)) == (b"9", ["file"])


def test_a_removed_file_is_absent_and_may_be_created_again(tmp_path: Path):
    path = tmp_path / "file"
    version = files.create(path, b"data")
    files.remove(path, version)
    assert files.read(path) is None and files.stat(path) is None
    assert files.list_files(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        files.open_file(path)
    with pytest.raises(ChangedError):
        files.replace(path, b"late", version)
    files.create(path, b"again")
    assert files.read_bytes(path) == b"again"


def test_a_file_may_be_published_from_a_stream(tmp_path: Path):
    path = tmp_path / "file"
    version = files.create(path, b"old")
    with files.spool(tmp_path) as new:
        new.file.write(b"new")
        assert path.read_bytes() == b"old" and files.list_files(tmp_path)[0].path == path
        new.publish(path, version)
    assert (path.read_bytes(), names(tmp_path)) == (b"new", ["file"])


def test_an_error_in_a_stream_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "file"
    files.create(path, b"old")
    with pytest.raises(KeyboardInterrupt), files.spool(tmp_path) as new:
        new.file.write(b"half")
        raise KeyboardInterrupt
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path: Path):
    path = tmp_path / "file"
    version = files.create(path, b"old")
    with files.open_file(path) as reader:
        files.replace(path, b"new", version)
        assert reader.read() == b"old"


def test_of_many_threads_each_change_is_made_once(tmp_path: Path):
    path = tmp_path / "number"
    count_in_threads(path, num_threads=6, times=25)
    assert (path.read_bytes(), names(tmp_path)) == (b"150", ["number"])


@pytest.mark.parametrize("is_new", [True, False])
def test_a_writer_stopped_at_any_call_overwrites_nothing_when_it_wakes(
    tmp_path: Path, is_new: bool
):
    """Another publishes twice meanwhile: it finishes what was begun, or that is refused later."""
    num_stopped = num_refused = 0
    for step in range(1, 100):
        path = tmp_path / str(step) / "file"
        version = "" if is_new else files.create(path, b"old")
        process = start(path, step, version, "stopped")
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        if not said.startswith("stopped"):
            assert said == "done"
            process.wait()
            break
        num_stopped += 1
        wait_until_stopped(process.pid)
        # It may be in place by now, or put there by the first of these who finds its claim.
        for text in (b"second", b"third"):
            publish_in_spite(path, text)
        os.kill(process.pid, signal.SIGCONT)
        (end,) = process.stdout.read().split()
        process.wait()
        assert path.read_bytes() == b"third", said
        assert end in ("done", "ChangedError"), said
        num_refused += end == "ChangedError"
        left = [name for name in names(path.parent) if name != "file"]
        assert all(is_temporary(name) for name in left) and len(left) <= 1, (said, left)
    assert num_stopped > (5 if is_new else 8)
    assert 0 < num_refused < num_stopped


def wait_until_stopped(pid: int) -> None:
    while "T" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
        time.sleep(0.01)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_writer_killed_at_any_call_blocks_nobody(tmp_path: Path, is_new: bool):
    for step in range(1, 100):
        path = tmp_path / str(step) / "file"
        version = "" if is_new else files.create(path, b"old")
        process = start(path, step, version, "killed")
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        if said == "done":
            process.wait()
            break
        process.kill()
        process.wait()
        assert files.read_bytes(path) in ({None, b"killed"} if is_new else {b"old", b"killed"})
        for text in (b"second", b"third"):
            publish_in_spite(path, text)
        assert path.read_bytes() == b"third", said
        remove_leftovers(path.parent)
        assert names(path.parent) == ["file"], said
    assert step > 5


def test_a_claim_whose_file_a_power_cut_took_is_passed_over(tmp_path: Path):
    path = tmp_path / "file"
    version = files.create(path, b"old")
    for number in range(3):
        (tmp_path / f".file.{version}.{number}.claim").symlink_to(f"lost-{number}.tmp")
    files.replace(path, b"new", version)
    assert (path.read_bytes(), names(tmp_path)) == (b"new", ["file"])


@pytest.mark.parametrize("call", ["fsync", "link", "symlink", "rename", "utime", "unlink"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_io_error_anywhere_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch, call, code):
    path = tmp_path / "file"
    version = files.create(path, b"old")
    function, failures = getattr(os, call), [OSError(code, os.strerror(code))]

    def failing(*arguments, **options):
        if failures:
            raise failures.pop()
        return function(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    try:
        files.replace(path, b"new", version)
    except OSError as error:
        assert error.errno == code
    assert files.read_bytes(path) in (b"old", b"new")
    while files.read_bytes(path) != b"later":
        try:
            files.replace(path, b"later", files.version_of(path))
        except ChangedError:
            assert files.read_bytes(path) == b"new"  # finished by the one who came next


def test_where_there_is_no_room_the_folder_is_named_and_nothing_is_left(tmp_path: Path):
    """The error of an open file tells no name, and what was not written yet failed once more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large") as caught,
            files.spool(tmp_path) as new,
        ):
            for _ in range(1000):
                new.file.write(b"a" * 700)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_processes_that_live_are_kept(tmp_path: Path):
    young, old = temporary_path(tmp_path / "x"), temporary_path(tmp_path / "x")
    for path in (young, old, tmp_path / "x"):
        path.write_bytes(b"")
        os.utime(path, (1, 1))
    os.utime(young)
    assert remove_leftovers(tmp_path) == 1
    assert names(tmp_path) == sorted([young.name, "x"])
    assert remove_leftovers(tmp_path / "missing") == 0


def test_files_are_made_with_the_users_own_permissions(tmp_path: Path):
    """Temporary files are often 0600, which locks out the other users of a shared folder."""
    files.create(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_the_store_tells_its_own_time(tmp_path: Path):
    (tmp_path / "x").touch()
    assert abs(files.now(tmp_path) - (tmp_path / "x").stat().st_mtime) < 5
    assert names(tmp_path) == ["x"]
    assert local.LocalStore().now(tmp_path / "missing") > 0


def test_a_folder_where_a_file_belongs_is_told(tmp_path: Path) -> None:
    """It was taken for the file of a faster process, again and again."""
    (tmp_path / "card").mkdir()
    with pytest.raises(IsADirectoryError, match="take it away"):
        files.create(tmp_path / "card", b"text")
