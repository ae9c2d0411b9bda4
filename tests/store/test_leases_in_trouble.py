"""Leases on a store that fails half way, and under clocks that are wrong."""

import errno
import os
import threading
import time

import pytest

from stream_engine.run_dir.paths import RunDir
from stream_engine.store import local
from stream_engine.store.leases import Lease, list_leases
from tests.store.leasing import acquire, fail_once_after, foreign_lease


def test_a_damaged_lease_file_goes_stale_like_any_other(run_dir: RunDir):
    path = foreign_lease(run_dir, age_s=0)
    path.write_bytes(b"\0" * 100)
    assert acquire(run_dir) is None
    os.utime(path, (1, 1))
    assert acquire(run_dir) is not None


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
