"""Files of a run in an object store: the same promises as on a disk, against a real S3 server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stream_engine.errors import ChangedError, ConfigError
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.store.files import location
from stream_engine.store.leases import Lease, list_leases
from stream_engine.store.objects import object_store
from stream_engine.store.transient import is_transient
from tests.s3 import Fault, FaultyProxy, client, environment, free_port, s3_server
from tests.store.publishing import count_in_threads


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Read and write at an address from now on."""

    def at(address: str) -> None:
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        object_store.cache_clear()

    yield at
    object_store.cache_clear()


@pytest.fixture
def folder(server: str, use, request: pytest.FixtureRequest) -> Location:
    use(server)
    return location(f"s3://bucket/{request.node.name.replace('[', '-').rstrip(']')}")


def test_an_object_is_created_once(folder: Location):
    path = folder / "a" / "file.json"
    version = files.create(path, b"data")
    entry = files.stat(path)
    assert entry is not None and (entry.version, entry.size) == (version, 4)
    with pytest.raises(ChangedError, match=r"file\.json"):
        files.create(path, b"other")
    assert files.read_bytes(path) == b"data"


def test_an_object_is_replaced_over_the_version_that_was_read_and_no_other(folder: Location):
    path = folder / "file"
    first = files.create(path, b"one")
    second = files.replace(path, b"two", first)
    for stale in (first, None):
        with pytest.raises(ChangedError):
            files.replace(path, b"three", stale)
    assert files.read_bytes(path) == b"two" and files.version_of(path) == second


def test_a_removed_object_is_absent_and_may_be_created_again(folder: Location):
    path = folder / "file"
    version = files.create(path, b"data")
    files.remove(path, version)
    assert files.read(path) is None and files.stat(path) is None
    assert files.list_files(folder) == []
    with pytest.raises(FileNotFoundError):
        files.open_file(path)
    files.create(path, b"again")
    assert files.read_bytes(path) == b"again"
    files.erase(path)
    assert files.read(path) is None


def test_listings_tell_files_and_folders_by_name(folder: Location):
    for name in ("b", "a", ".hidden"):
        files.create(folder / name, b"x")
    files.create(folder / "inner" / "c", b"yy")
    files.create(folder / ".secret" / "d", b"z")
    assert [(e.path.name, e.size) for e in files.list_files(folder)] == [("a", 1), ("b", 1)]
    assert files.list_folders(folder) == [folder / "inner"]
    assert files.list_files(folder / "missing") == files.list_folders(folder / "missing") == []


def test_a_listing_of_more_than_one_page_is_whole(folder: Location, server: str, use):
    """A store tells a thousand names at a time; here the last page also breaks off once."""
    names = [f"{i:04d}" for i in range(600)]
    store, prefix = client(server), str(folder).removeprefix("s3://bucket/")
    keys = [f"{prefix}/{kind}{name}" for name in names for kind in ("", "in-")]

    def put(key: str) -> None:
        inner = "/inner" if "/in-" in key else ""
        store.put_object(Bucket="bucket", Key=key + inner, Body=b"x")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, keys))
    pages: list[str] = []

    def decide(_: int, method: str, path: str) -> Fault:
        pages.extend([path] * ("list-type" in path))
        return "cut" if len(pages) == 2 else ""

    with FaultyProxy(server, decide) as proxy:
        use(proxy.address)
        assert [entry.name for entry in files.list_files(folder)] == names
        assert len(pages) == 4
        assert [path.name for path in files.list_folders(folder)] == [f"in-{n}" for n in names]
        assert len(pages) == 6


@pytest.mark.parametrize("request_of", ["?uploads", "partNumber=2", "uploadId="])
@pytest.mark.parametrize("fault", ["lost", "fail", "cut"])
def test_a_large_file_is_taken_over_whatever_answer_does_not_arrive(
    folder: Location, server: str, use, tmp_path: Path, request_of: str, fault: Fault
):
    """It goes in several requests: the answer to the last one broke off, the upload was then found
    gone, and that was taken for a file that is not there."""
    source, content = tmp_path / "rows", os.urandom(12 << 20)
    source.write_bytes(content)
    met: list[str] = []

    def decide(_: int, method: str, path: str) -> Fault:
        is_last = request_of == "uploadId=" and method != "POST"
        if method not in ("POST", "PUT") or request_of not in path or is_last or met:
            return ""
        met.append(path)
        return fault

    with FaultyProxy(server, decide) as proxy:
        use(proxy.address)
        files.take(source, folder / "rows")
        assert met and files.read_bytes(folder / "rows") == content
    assert not source.exists()


def test_a_large_object_is_streamed_and_read_at_any_place(folder: Location):
    path, content = folder / "big", os.urandom(21 << 20)
    with files.spool(folder) as new:
        new.file.write(content)
        new.publish(path)
    with files.open_file(path) as file:
        assert file.seek(-100, os.SEEK_END) == len(content) - 100
        assert file.read() == content[-100:]
        file.seek(5 << 20)
        assert file.read(9 << 20) == content[5 << 20 : 14 << 20]
        file.seek(0)
        assert file.read() == content


def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture(folder: Location):
    path = folder / "big"
    version = files.create(path, b"a" * (12 << 20))
    with files.open_file(path) as file:
        assert file.read(10) == b"a" * 10
        files.replace(path, b"b" * (12 << 20), version)
        with pytest.raises(OSError, match="Stale"):
            file.seek(8 << 20)
            file.read(10)


def test_of_many_threads_each_change_is_made_once(folder: Location):
    path = folder / "number"
    count_in_threads(path, num_threads=5, times=8)
    assert files.read_bytes(path) == b"40"


@pytest.mark.parametrize("fault", ["lost", "fail", "repeat"])
def test_a_request_that_is_lost_failed_or_repeated_is_done_once(
    folder: Location, server: str, use, fault: Fault
):
    """An answer that did not arrive: the request is sent again and meets its own effect."""
    with FaultyProxy(server, lambda number, *_: fault if number % 2 else "") as proxy:
        use(proxy.address)
        path = folder / "file"
        version = files.create(path, b"0")
        for i in range(1, 6):
            version = files.replace(path, b"%d" % i, version)
        assert files.read_bytes(path) == b"5"
        files.remove(path, version)
        assert files.read(path) is None
        assert proxy.num_changes >= 7


def test_an_answer_that_was_lost_hides_no_other_writer(folder: Location, server: str, use):
    """The request was refused and its answer lost: it is not taken for done."""
    path = folder / "file"
    files.create(path, b"theirs")
    with FaultyProxy(server, lambda number, *_: "lost" if number == 1 else "") as proxy:
        use(proxy.address)
        with pytest.raises(ChangedError):
            files.create(path, b"theirs")
        assert proxy.num_changes == 2


def test_one_contender_has_a_lease_and_a_stale_one_is_taken_over(folder: Location, monkeypatch):
    lease = Lease.acquire(folder, "shard-000000", worker_id="me", timeout_s=2)
    assert lease is not None
    assert Lease.acquire(folder, "shard-000000", worker_id="other", timeout_s=2) is None
    (info,) = list_leases(folder)
    assert (info.name, info.worker_id, info.is_stale) == ("shard-000000", "me", False)
    lease.verify()
    monkeypatch.setattr("stream_engine.store.leases.is_alive", lambda holder: None)
    lease._stop.set()  # its heart stops, as that of a process that was stopped
    lease._heart.join()
    lease._stop.clear()
    taken = None
    for _ in range(100):
        taken = Lease.acquire(folder, "shard-000000", worker_id="other", timeout_s=2)
        if taken is not None:
            break
        threading.Event().wait(0.1)
    assert taken is not None and taken.taken_from is not None
    assert taken.taken_from.worker_id == "me" and taken.holder.number > lease.holder.number
    lease.release()
    (info,) = list_leases(folder)
    assert info.worker_id == "other"
    taken.release()
    assert list_leases(folder) == []


def test_a_request_on_its_way_for_long_sets_no_clock_forward(folder: Location, server: str, use):
    """The time for which the store was asked counted from before the request: leases that were
    beating looked stale for as long as it had been on its way."""

    def decide(_: int, method: str, path: str) -> Fault:
        time.sleep(4.0 * (method == "PUT" and "/.clock-" in path))
        return ""

    with FaultyProxy(server, decide) as proxy:
        use(proxy.address)
        files.now(folder)
        now = files.now(folder)
        files.create(folder / "later", b"x")
        (entry,) = files.list_files(folder)
        assert now < entry.modified + 2.0


def test_a_bucket_that_is_not_there_is_said(folder: Location):
    """Not taken for an object that is absent: a run whose bucket went away has lost no results."""
    path = location("s3://nobody/run/x")
    for use_it in (lambda: files.create(path, b"x"), lambda: files.read(path)):
        with pytest.raises(OSError, match="there is no such bucket"):
            use_it()
    with pytest.raises(OSError, match="there is no such bucket"):
        files.list_files(path.parent)


def test_an_object_whose_content_always_breaks_off_is_an_error_of_reading(
    folder: Location, server: str, use, monkeypatch
):
    """It was an error of the foreign package, which nothing catches."""
    files.create(folder / "file", b"0123456789")
    monkeypatch.setattr("stream_engine.store.objects.RETRIES", {"max_retries": 0})
    with FaultyProxy(server, lambda _, method, __: "cut" if method == "GET" else "") as proxy:
        use(proxy.address)
        for read in (files.read_bytes, lambda path: files.read_ends(path, head=4, tail=4)):
            with pytest.raises(OSError, match="can the store be reached"):
                read(folder / "file")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "https://no-such-host.invalid:9000"])
def test_an_address_at_which_nobody_answers_is_said_in_one_line(use, address: str):
    """It was asked for as long as a store is waited for that refuses in the midst of a run."""
    use(address)
    with pytest.raises(OSError, match=f"nobody answers at {address} ") as caught:
        files.read(location("s3://bucket/run/x"))
    assert "\n" not in str(caught.value) and "can the store be reached" in str(caught.value)
    assert not is_transient(caught.value)


def test_a_store_that_was_reached_is_waited_for(folder: Location, server: str, use, monkeypatch):
    """As by a process that comes to help in the midst of a run."""
    path, port = folder / "x", free_port()
    files.create(path, b"here")
    monkeypatch.setattr("stream_engine.store.objects.FIRST_RETRIES", {"max_retries": 0})
    use(f"http://127.0.0.1:{port}")
    with pytest.raises(OSError, match="nobody answers"):
        files.read_bytes(path)
    files.trust(path)
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(files.read_bytes, path)
        with pytest.raises(TimeoutError):
            found.result(timeout=1.5)
        with FaultyProxy(server, lambda *_: "", port=port):
            assert found.result() == b"here"


def test_a_store_that_refuses_the_first_request_is_waited_for(folder: Location, server: str, use):
    files.create(folder / "x", b"here")
    requests = iter(range(100))
    with FaultyProxy(server, lambda *_: "fail" if next(requests) < 8 else "") as proxy:
        use(proxy.address)
        assert files.read_bytes(folder / "x") == b"here"


def test_a_name_without_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="names no bucket"):
        location("s3://")
