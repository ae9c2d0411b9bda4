import os
from pathlib import Path

import msgspec
import pytest

from stream_engine.errors import ChangedError, ConservationError, ShardReadError
from stream_engine.records import SCHEMA_VERSION, AnswerScore, Failure, SampleRewards, ShardInfo
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import (
    ResultHeader,
    quarantined_by,
    read_header,
    read_results,
    write_results,
)
from stream_engine.store import files

INFO = ShardInfo(index=3, num_samples=5, num_bytes=1, sha256="abc", keys=[], ids=[])
RECORDS = [
    SampleRewards(key=f"{i:032x}", scores=[AnswerScore(index=0, score=i / 3)]) for i in range(4)
]
FAILURES = [Failure(reason="too_long", stage="rewards", key="k", detail="ünicode")]


def make_header(**changes) -> ResultHeader:
    header = ResultHeader(
        stage="rewards",
        shard=3,
        shard_sha256="abc",
        fingerprint="f1",
        num_samples=5,
        num_results=4,
        num_quarantined=1,
        created_by={"worker": "w"},
    )
    return msgspec.structs.replace(header, **changes)


def put(run_dir: RunDir, header: ResultHeader, records, failures) -> None:
    over = files.version_of(run_dir.result(header.stage, header.shard))
    write_results(run_dir, header, records, failures, over=over)


@pytest.fixture
def path(run_dir: RunDir) -> Path:
    put(run_dir, make_header(), iter(RECORDS), FAILURES)
    return run_dir.result("rewards", 3)


def test_header_records_and_failures_come_back(run_dir: RunDir, path: Path):
    header = read_header(path)
    assert msgspec.structs.replace(header, quarantine="") == make_header()
    assert list(read_results(path, SampleRewards)) == RECORDS
    assert list(quarantined_by(run_dir, header)) == FAILURES


def test_equal_results_hold_equal_records(run_dir: RunDir, path: Path):
    """Their quarantine files have names of their own, and one of the two is left."""
    before = path.read_bytes(), read_header(path).quarantine
    put(run_dir, make_header(), iter(RECORDS), FAILURES)
    after = path.read_bytes(), read_header(path).quarantine
    assert (
        after[0].replace(after[1].encode(), b"")[:-72]
        == (before[0].replace(before[1].encode(), b"")[:-72])
    )
    assert [p.name for p in run_dir.quarantine_dir.iterdir()] == [after[1]] != [before[1]]


def test_without_failures_there_is_no_quarantine_file(run_dir: RunDir, path: Path):
    header = make_header(num_samples=4, num_quarantined=0)
    put(run_dir, header, RECORDS, [])
    assert list(run_dir.quarantine_dir.iterdir()) == []
    assert list(quarantined_by(run_dir, read_header(path))) == []


def test_a_result_is_written_over_the_version_that_was_read_and_no_other(run_dir: RunDir, path):
    stale = files.version_of(path)
    put(run_dir, make_header(fingerprint="f2"), RECORDS, FAILURES)
    for over in (stale, None):
        with pytest.raises(ChangedError, match="another process"):
            write_results(run_dir, make_header(), RECORDS, FAILURES, over=over)
    header = read_header(path)
    assert header.fingerprint == "f2" and list(quarantined_by(run_dir, header)) == FAILURES


def test_a_cut_anywhere_is_noticed_by_header_and_records(path: Path):
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        os.truncate(path, size)
        with pytest.raises(ShardReadError, match=path.name):
            read_header(path)
        with pytest.raises(ShardReadError, match=path.name):
            list(read_results(path, SampleRewards))
        path.write_bytes(whole)


def test_a_flipped_bit_anywhere_is_noticed_before_a_record_is_yielded(path: Path):
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 5), len(whole) - 1]:
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(ShardReadError, match=path.name):
            next(read_results(path, SampleRewards))


def test_appended_bytes_are_noticed(path: Path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ShardReadError):
        read_header(path)


def test_a_missing_file_is_a_read_error_that_names_it(run_dir: RunDir):
    with pytest.raises(ShardReadError, match=r"000009\.msgpack"):
        read_header(run_dir.result("rewards", 9))
    with pytest.raises(ShardReadError, match=r"000009\.msgpack"):
        list(read_results(run_dir.result("rewards", 9), SampleRewards))


def test_a_newer_schema_is_refused(run_dir: RunDir):
    put(run_dir, make_header(schema_version=SCHEMA_VERSION + 1), RECORDS, FAILURES)
    with pytest.raises(ShardReadError, match="schema version"):
        read_header(run_dir.result("rewards", 3))


@pytest.mark.parametrize(
    ("changes", "records", "failures"),
    [
        pytest.param({"num_samples": 6}, RECORDS, FAILURES, id="samples"),
        pytest.param({}, RECORDS, [], id="failure-missing"),
        pytest.param({}, RECORDS[:3], FAILURES, id="record-missing"),
        pytest.param({}, [*RECORDS, RECORDS[0]], FAILURES, id="record-too-many"),
    ],
)
def test_counts_that_do_not_add_up_are_refused(run_dir: RunDir, changes, records, failures):
    with pytest.raises(ConservationError, match="shard 3"):
        put(run_dir, make_header(**changes), records, failures)
    assert not run_dir.result("rewards", 3).exists()
    assert not list(run_dir.quarantine_dir.glob("[!.]*")) or records != RECORDS


@pytest.mark.parametrize("damage", ["unlink", "cut"])
def test_a_quarantine_file_that_is_lost_or_cut_is_named(run_dir: RunDir, path: Path, damage: str):
    header = read_header(path)
    quarantine = run_dir.quarantine(header.quarantine)
    if damage == "unlink":
        quarantine.unlink()
    else:
        quarantine.write_bytes(b"\n")
    with pytest.raises(ShardReadError, match=quarantine.name):
        list(quarantined_by(run_dir, header))


def test_the_quarantine_file_is_there_before_the_result(run_dir: RunDir, monkeypatch):
    linked = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b: (linked.append(Path(b)), link(a, b)))
    put(run_dir, make_header(), RECORDS, FAILURES)
    quarantine = read_header(run_dir.result("rewards", 3)).quarantine
    assert linked == [run_dir.quarantine(quarantine), run_dir.result("rewards", 3)]
