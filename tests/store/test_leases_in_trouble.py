"""Leases on a store that fails half way, and under clocks that are wrong."""

import errno
import os
import threading
import time

import pytest

from stream_engine.run_dir.paths import RunDir
from stream_engine.store import local
from stream_engine.store.leases import Lease, list_leases
from stream_engine.store.processes import system_identity
from tests.store.leasing import acquire, fail_once_after, foreign_lease


def test_a_damaged_lease_file_goes_stale_like_any_other(run_dir: RunDir):
    path = foreign_lease(run_dir, age_s=0)
    path.write_bytes(b"\0" * 100)
    assert acquire(run_dir) is None
    os.utime(path, (1, 1))
    assert acquire(run_dir) is not None


@pytest.mark.parametrize(
    "content",
    [b'{"token":"a","x":' + b"[" * 100_000, b"[]", b"\xff\xfe{"],
    ids=["deep", "list", "bin"],
)
def test_a_lease_file_of_whatever_content_stops_nobody(run_dir: RunDir, content: bytes):
    """One nested deeply, or with a process number that no system has, ended each worker's look."""
    path = foreign_lease(run_dir, age_s=0)
    path.write_bytes(content)
    assert acquire(run_dir) is None
    assert [lease.worker_id for lease in list_leases(run_dir.leases_dir)] == ["unknown"]


def test_a_process_number_that_no_system_has_is_of_nobody(run_dir: RunDir):
    foreign_lease(run_dir, age_s=0, system=system_identity(), pid=2**40)
    (info,) = list_leases(run_dir.leases_dir)
    assert info.is_alive is False and info.is_stale
    assert acquire(run_dir) is not None


def test_a_link_that_leads_to_itself_is_no_lease(run_dir: RunDir):
    foreign_lease(run_dir, age_s=0)
    loop = run_dir.leases_dir / "loop.json"
    loop.symlink_to(loop)
    assert [lease.name for lease in list_leases(run_dir.leases_dir)] == ["shard-000000"]


def test_a_lease_from_a_clock_that_was_ahead_goes_stale_when_nobody_renews_it(run_dir: RunDir):
    """It was waited for until this clock had come as far: for hours."""
    path = foreign_lease(run_dir, age_s=-7200, timeout_s=0.3)
    assert acquire(run_dir, timeout_s=0.3) is None
    os.utime(path, (time.time() + 7201, time.time() + 7201))  # it beats
    assert not list_leases(run_dir.leases_dir)[0].is_stale
    deadline = time.monotonic() + 30
    while not list_leases(run_dir.leases_dir)[0].is_stale and time.monotonic() < deadline:
        time.sleep(0.05)
    lease = acquire(run_dir, timeout_s=0.3)
    assert lease is not None and lease.taken_from.worker_id == "far"


def test_a_lease_file_replaced_while_it_is_read_counts_as_gone(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
):
    """A network file system says ESTALE then, which ended the worker that looked."""
    path = foreign_lease(run_dir, age_s=0)

    def stale(*args: object):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(local, "open", stale, raising=False)
    assert list_leases(run_dir.leases_dir) == []


def test_a_lease_whose_taking_failed_half_way_falls_silent(run_dir: RunDir, monkeypatch):
    """One I/O error after the link: the lease's heart beat on, and all workers waited."""
    fail_once_after(monkeypatch, "link")
    before = threading.active_count()
    with pytest.raises(OSError, match="Input/output"):
        Lease.acquire(run_dir.leases_dir, "ingest", worker_id="me", timeout_s=0.3)
    assert threading.active_count() == before
    deadline = time.monotonic() + 30
    lease = None
    while lease is None and time.monotonic() < deadline:
        time.sleep(0.1)
        lease = Lease.acquire(run_dir.leases_dir, "ingest", worker_id="me", timeout_s=0.3)
    assert lease is not None, "nobody got the lease again"
    lease.release()


def test_a_clock_that_is_wrong_by_an_hour_judges_no_lease(run_dir: RunDir, monkeypatch):
    """Times are the file system's own, whatever this machine believes."""
    lease = acquire(run_dir, timeout_s=5)
    real = time.time
    for wrong_s in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda wrong_s=wrong_s: real() + wrong_s)
        assert acquire(run_dir, "other", timeout_s=5) is None
        (info,) = list_leases(run_dir.leases_dir)
        assert not info.is_stale and info.age_s < 60 and info.held_s < 60
    lease.release()


def test_a_failed_beat_that_came_through_after_all_keeps_the_lease(run_dir: RunDir, monkeypatch):
    lease = acquire(run_dir)
    fail_once_after(monkeypatch, "rename")
    with pytest.raises(OSError, match="Input/output"):
        lease.verify()
    lease.verify()
    assert acquire(run_dir, "other") is None
    lease.release()
    assert list_leases(run_dir.leases_dir) == []


@pytest.mark.parametrize("call", ["open", "utime", "symlink", "rename"])
def test_a_lease_that_could_not_be_given_back_is_free_for_its_own_process(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, call: str
):
    """A worker whose disk failed once waited a minute for the lease that it had held itself."""
    lease = acquire(run_dir)
    module = local if call == "open" else os
    function, failures = getattr(module, call, open), [OSError(errno.EIO, "Input/output error")]

    def failing(path, *arguments, **options):
        if failures and arguments[:1] != ("rb",):
            raise failures.pop()
        return function(path, *arguments, **options)

    monkeypatch.setattr(module, call, failing, raising=False)
    lease.release()
    assert not failures
    again = acquire(run_dir) or acquire(run_dir)  # the first may finish what had begun
    assert again is not None and again.taken_from is None
    again.verify()


def test_a_lease_that_failed_half_way_is_free_for_its_own_process(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
):
    """Whoever came next finished it: the file then named a holder that held nothing."""
    with acquire(run_dir):
        pass  # its file is there, and empty
    rename, failures = os.rename, [OSError(errno.ENOSPC, "No space left on device")]

    def failing(*arguments):
        if failures:
            raise failures.pop()
        return rename(*arguments)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        acquire(run_dir)
    again = acquire(run_dir)
    assert again is not None and again.taken_from is None
