import os
import signal
import socket
import subprocess
import sys
import time

import msgspec
import pytest

from stream_engine.errors import LeaseLostError
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files, leases
from stream_engine.store.leases import Lease, list_leases, this_process
from tests.store.leasing import acquire, foreign_lease

HOLD = """
import sys, time
from stream_engine.store.leases import Lease
from stream_engine.run_dir.paths import RunDir
root, name, worker_id, timeout_s = sys.argv[1:]
folder = RunDir(root).leases_dir
lease = Lease.acquire(folder, name, worker_id=worker_id, timeout_s=float(timeout_s))
print("held" if lease else "refused", flush=True)
for line in sys.stdin:
    try:
        lease.verify()
        print("still", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture
def start_holder(run_dir: RunDir):
    """Start processes that ask for a lease and then verify it once per line of input."""
    started: list[subprocess.Popen] = []

    def start(worker_id: str, timeout_s: float = 60.0) -> subprocess.Popen:
        arguments = [str(run_dir.root), "shard-000000", worker_id, str(timeout_s)]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def test_a_held_lease_is_refused_to_others_and_free_after_release(run_dir: RunDir):
    lease = acquire(run_dir)
    assert lease is not None
    assert acquire(run_dir, "other") is None
    lease.verify()
    lease.release()
    with acquire(run_dir, "other") as second:
        second.verify()
    assert list_leases(run_dir.leases_dir) == []


def test_release_twice_is_harmless_and_verify_then_fails(run_dir: RunDir):
    lease = acquire(run_dir)
    lease.release()
    lease.release()
    with pytest.raises(LeaseLostError, match="shard-000000"):
        lease.verify()


def test_leases_of_other_names_do_not_conflict(run_dir: RunDir):
    with (
        acquire(run_dir),
        Lease.acquire(run_dir.leases_dir, "merge", worker_id="me", timeout_s=60) as other,
    ):
        assert other is not None
        assert [info.name for info in list_leases(run_dir.leases_dir)] == ["merge", "shard-000000"]


def test_lease_of_a_killed_process_is_taken_over_at_once(run_dir: RunDir, start_holder):
    holder = start_holder("victim", timeout_s=3600)
    assert answer(holder) == "held"
    assert acquire(run_dir, timeout_s=3600) is None
    holder.kill()
    holder.wait()
    with acquire(run_dir, timeout_s=3600) as lease:
        lease.verify()


def test_a_lease_says_from_whom_it_was_taken_over(run_dir: RunDir, start_holder):
    """A record that kills its process left no trace, since nobody could tell a death."""
    holder = start_holder("victim", timeout_s=3600)
    assert answer(holder) == "held"
    holder.kill()
    holder.wait()
    with acquire(run_dir) as lease:
        assert lease.taken_from is not None and lease.taken_from.worker_id == "victim"
    with acquire(run_dir) as lease:
        assert lease.taken_from is None


def test_a_zombie_counts_as_gone(run_dir: RunDir, start_holder):
    holder = start_holder("victim", timeout_s=3600)
    assert answer(holder) == "held"
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert acquire(run_dir, timeout_s=3600) is not None


def test_a_reused_pid_counts_as_gone(run_dir: RunDir):
    lease = acquire(run_dir)
    changed = msgspec.structs.replace(lease.holder, process_start="1")
    lease.path.write_bytes(msgspec.json.encode(changed))
    assert acquire(run_dir, "other") is not None


def test_foreign_lease_is_respected_until_its_timeout(run_dir: RunDir):
    foreign_lease(run_dir, age_s=50)
    assert acquire(run_dir) is None
    foreign_lease(run_dir, age_s=70)
    with acquire(run_dir) as lease:
        lease.verify()


def test_the_longer_of_both_timeouts_counts(run_dir: RunDir):
    foreign_lease(run_dir, age_s=70, timeout_s=100)
    assert acquire(run_dir, timeout_s=1) is None


def test_same_host_name_in_another_container_is_not_judged_by_its_pid(run_dir: RunDir):
    """Two containers may share a host name; a pid of one means nothing in the other."""
    foreign_lease(run_dir, age_s=0, host=socket.gethostname(), pid=2**22 + 1)
    assert acquire(run_dir) is None


def test_heartbeat_keeps_a_lease_beyond_its_timeout(run_dir: RunDir):
    with acquire(run_dir, timeout_s=1.5) as lease:
        time.sleep(2.0)
        content, entry = files.read(lease.path)
        assert not leases.is_stale(leases.holder_of(content, entry), entry, time.time())
        assert acquire(run_dir, "other", timeout_s=1.5) is None


def test_exactly_one_of_eight_contending_processes_wins(run_dir: RunDir, start_holder):
    foreign_lease(run_dir, age_s=100)
    contenders = [start_holder(f"worker-{i}") for i in range(8)]
    answers = [answer(process) for process in contenders]
    assert sorted(answers) == ["held"] + ["refused"] * 7
    winner = contenders[answers.index("held")]
    assert list_leases(run_dir.leases_dir)[0].pid == winner.pid


def test_exactly_one_thread_wins_every_take_over(run_dir: RunDir):
    """Many rounds of a barrier start, to hit the moment between judging and replacing."""
    import threading

    for _ in range(50):
        foreign_lease(run_dir, age_s=100)
        start = threading.Barrier(8)
        won: list[Lease] = []

        def contend(start=start, won=won) -> None:
            start.wait()
            lease = acquire(run_dir)
            if lease is not None:
                won.append(lease)

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].verify()
        won[0].release()
        assert list_leases(run_dir.leases_dir) == []


def test_a_paused_owner_finds_out_that_it_lost(run_dir: RunDir, start_holder):
    owner = start_holder("sleeper", timeout_s=0.5)
    assert answer(owner) == "held"
    os.kill(owner.pid, signal.SIGSTOP)
    time.sleep(1.0)
    lease = acquire(run_dir, "successor", timeout_s=0.5)
    assert lease is not None
    os.kill(owner.pid, signal.SIGCONT)
    print("verify", file=owner.stdin, flush=True)
    assert answer(owner) == "LeaseLostError"
    lease.verify()


def test_a_late_release_does_not_end_the_successors_lease(run_dir: RunDir):
    old = acquire(run_dir, "old")
    os.replace(foreign_lease(RunDir(run_dir.root / "x"), age_s=0), old.path)
    old.release()
    assert list_leases(run_dir.leases_dir)[0].worker_id == "far"


def test_a_heartbeat_does_not_refresh_the_successors_lease(run_dir: RunDir):
    old = acquire(run_dir, "old", timeout_s=0.3)
    os.replace(foreign_lease(RunDir(run_dir.root / "x"), age_s=500), old.path)
    time.sleep(0.3)
    assert list_leases(run_dir.leases_dir)[0].age_s > 400
    old.release()


def test_list_leases_shows_age_and_liveness(run_dir: RunDir):
    foreign_lease(run_dir, age_s=100)
    with Lease.acquire(run_dir.leases_dir, "ingest", worker_id="me", timeout_s=60):
        near, far = list_leases(run_dir.leases_dir)
    assert (near.name, near.worker_id, near.is_alive, near.is_stale) == (
        "ingest",
        "me",
        True,
        False,
    )
    assert (near.pid, near.host) == (os.getpid(), socket.gethostname())
    assert (far.worker_id, far.is_alive, far.is_stale) == ("far", None, True)
    assert 99 < far.age_s < 160


def test_a_long_wait_names_the_holder_once_and_again_when_it_falls_silent(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """`run` waited for another process that read the input, and did not say for whom."""
    monkeypatch.setattr(leases, "TELL_AFTER_S", 0.0)
    caplog.set_level("INFO")
    path = foreign_lease(run_dir, age_s=0.0)
    wait = leases.Wait(run_dir.leases_dir, "shard-000000", timeout_s=100.0)
    wait.tell()
    wait.tell()
    (told,) = caplog.messages
    assert "waiting for" in told and "of elsewhere" in told and "is alive" in told
    past = path.stat().st_mtime - 70
    os.utime(path, (past, past))
    wait.tell()
    assert "taken over after 100 s" in caplog.messages[-1]


def test_of_many_leases_only_those_that_missed_a_beat_are_read(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
):
    """A thousand workers each read the leases of all the others at every look."""
    monkeypatch.setattr(leases, "MANY_LEASES", 3)
    dead = this_process("dead", 60, number=1, now=time.time())
    dead = msgspec.structs.replace(dead, process_start="another time")
    for i in range(5):
        files.create(run_dir.lease(f"shard-{i:06d}"), msgspec.json.encode(dead))
    paths = sorted(run_dir.leases_dir.iterdir())
    for path in paths[:2]:
        os.utime(path, (1, time.time() - 2 * leases.BEATING_S))
    read: list[str] = []
    read_file = files.read
    monkeypatch.setattr(files, "read", lambda path: read.append(path.name) or read_file(path))
    known: dict = {}
    found = list_leases(run_dir.leases_dir, known=known)
    assert read == [path.name for path in paths[:2]]
    assert [lease.is_stale for lease in found] == [True, True, False, False, False]
    assert [lease.worker_id for lease in found] == ["dead", "dead"] + ["unknown"] * 3
    assert list_leases(run_dir.leases_dir, known=known)[0].is_stale
    assert len(read) == 2, "a beat is read once"
    assert all(lease.is_stale for lease in list_leases(run_dir.leases_dir)), "who asks for all"
    files.remove(paths[0], files.version_of(paths[0]) or "")
    list_leases(run_dir.leases_dir, known=known)
    assert paths[0].name not in known


def test_no_leases_folder_means_no_leases(run_dir: RunDir):
    assert list_leases(run_dir.leases_dir) == []


def test_numbers_grow_with_each_holder(run_dir: RunDir):
    numbers = []
    for _ in range(4):
        with acquire(run_dir) as lease:
            numbers.append(lease.holder.number)
        time.sleep(0.002)
    foreign_lease(run_dir, age_s=100, number=numbers[-1] + 10**9)
    with acquire(run_dir) as lease:
        numbers.append(lease.holder.number)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == numbers[-2] + 10**9 + 1
