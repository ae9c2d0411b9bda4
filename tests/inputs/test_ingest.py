import json
import os
import sqlite3
import tempfile
from pathlib import Path

import msgspec
import pytest

from stream_engine.config import InputConfig
from stream_engine.errors import ConfigError, ConservationError
from stream_engine.inputs import ingest as ingest_module
from stream_engine.inputs import readers as readers_module
from stream_engine.inputs.ingest import IngestReport, ingest
from stream_engine.inputs.sources import input_fingerprint
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_quarantine
from stream_engine.run_dir.shards import write_shard
from stream_engine.store import files
from tests.inputs.ingested import (
    CONFIG,
    counts,
    durable,
    ids_of,
    numbers,
    quarantined,
    samples_of,
)
from tests.samples import make_row, make_sample, tree, write_jsonl, write_parquet


def test_samples_are_cut_into_shards_in_order(run_dir: RunDir, tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", numbers(0, 10))
    report = ingest(run_dir, [str(path)], CONFIG)
    assert counts(report) == (10, 10, 0, {})
    assert report.num_shards == 3
    assert [info.num_samples for info in Manifest.load(run_dir).shards] == [4, 4, 2]
    assert ids_of(run_dir) == [str(i) for i in range(10)]
    assert not any(run_dir.quarantine_dir.iterdir())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", numbers(0, 10))
    for name in ("one", "two"):
        ingest(RunDir(tmp_path / name), [str(path)], CONFIG)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_an_input_that_did_not_change_is_not_read_again(run_dir: RunDir, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", numbers(0, 10))
    ingest(run_dir, [str(path)], CONFIG)
    before = tree(run_dir.root)
    monkeypatch.setattr(ingest_module, "read_rows", lambda *_, **__: pytest.fail("it was read"))
    report = ingest(run_dir, [str(path)], CONFIG)
    assert counts(report) == (0, 0, 0, {})
    assert report.skipped_inputs == [str(path)]
    assert tree(run_dir.root) == before


def test_an_append_adds_unseen_samples_only_and_touches_no_shard(run_dir: RunDir, tmp_path: Path):
    old = write_parquet(tmp_path / "old.parquet", numbers(0, 10))
    new = write_jsonl(tmp_path / "new.jsonl", numbers(5, 15))
    ingest(run_dir, [str(old)], CONFIG)
    shards = {path: path.stat() for path in run_dir.shards_dir.glob("*.tar")}
    report = ingest(run_dir, [str(old), str(new)], CONFIG)
    assert counts(report) == (10, 5, 5, {})
    assert ids_of(run_dir) == [str(i) for i in range(15)]
    assert [info.num_samples for info in Manifest.load(run_dir).shards] == [4, 4, 2, 4, 1]
    for path, status in shards.items():
        assert path.stat().st_mtime_ns == status.st_mtime_ns
        assert path.stat().st_ino == status.st_ino


def test_inputs_given_together_or_one_by_one_give_the_same(tmp_path: Path):
    paths = [
        str(write_parquet(tmp_path / "a.parquet", numbers(0, 6))),
        str(write_parquet(tmp_path / "b.parquet", numbers(3, 9))),
    ]
    ingest(RunDir(tmp_path / "together"), paths, CONFIG)
    for path in paths:
        ingest(RunDir(tmp_path / "apart"), [path], CONFIG)
    assert tree(tmp_path / "together") == tree(tmp_path / "apart")


def test_a_grown_input_is_read_again_and_only_its_new_rows_are_added(run_dir, tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 6))
    ingest(run_dir, [str(path)], CONFIG)
    write_jsonl(path, numbers(0, 8))
    assert counts(ingest(run_dir, [str(path)], CONFIG)) == (8, 2, 6, {})
    assert ids_of(run_dir) == [str(i) for i in range(8)]


def test_changed_reading_settings_read_an_input_again(run_dir: RunDir, tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 6))
    few = InputConfig(samples_per_shard=4, max_samples=2)
    assert counts(ingest(run_dir, [str(path)], few)) == (2, 2, 0, {})
    assert counts(ingest(run_dir, [str(path)], few)) == (0, 0, 0, {})
    assert counts(ingest(run_dir, [str(path)], CONFIG)) == (6, 4, 2, {})


def test_of_two_samples_of_an_input_with_one_id_the_first_is_kept(run_dir: RunDir, tmp_path: Path):
    rows = [make_row(1), make_row(2), {**make_row(3), "idx": 1}, make_row(1)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert counts(ingest(run_dir, [str(path)], CONFIG)) == (4, 2, 1, {"conflicting_id": 1})
    (failure,) = quarantined(run_dir)
    assert (failure.source, failure.row, failure.idx) == (str(path), 2, "1")
    assert len(failure.key) == 32
    assert "drop their column" in failure.detail

    write_jsonl(path, [{**make_row(4), "idx": "2"}, make_row(5)])
    assert counts(ingest(run_dir, [str(path)], CONFIG)) == (2, 1, 0, {"changed_row": 1})
    assert ids_of(run_dir) == ["1", "2", "5"]


def test_two_inputs_may_both_count_from_zero(tmp_path: Path):
    """The second was rejected as a whole, row by row, although the samples had other keys."""
    first = write_jsonl(tmp_path / "a.jsonl", numbers(0, 3))
    second = [{**make_row(10 + i), "idx": i} for i in range(3)]
    other = write_jsonl(tmp_path / "b.jsonl", [*second, make_row(1), make_row(7), make_row(7)])
    together, apart = RunDir(tmp_path / "together"), RunDir(tmp_path / "apart")
    report = ingest(together, [str(first), str(other)], CONFIG)
    assert counts(report) == (9, 7, 1, {"conflicting_id": 1})
    assert ids_of(together) == ["0", "1", "2", "0", "1", "2", "7"]
    assert [failure.source for failure in quarantined(together)] == [str(other)]
    assert len({sample.key for sample in samples_of(together)}) == 7
    for path in (first, other):
        ingest(apart, [str(path)], CONFIG)
    assert durable(together.root) == durable(apart.root)


def test_a_sample_that_another_input_brought_holds_its_id_in_this_one_too(run_dir, tmp_path: Path):
    ingest(run_dir, [str(write_jsonl(tmp_path / "a.jsonl", numbers(0, 3)))], CONFIG)
    other = write_jsonl(tmp_path / "b.jsonl", [make_row(1), {**make_row(9), "idx": 1}])
    report = ingest(run_dir, [str(other)], CONFIG)
    assert counts(report) == (2, 0, 1, {"conflicting_id": 1})


def test_every_row_is_added_known_or_named_in_quarantine(run_dir: RunDir, tmp_path: Path):
    rows = [
        *numbers(0, 3),
        {"idx": 3, "question": ""},
        "{broken",
        {"idx": 4, "question": "?", "image": "https://a.example/a.png"},
        make_row(0),
    ]
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data/a.jsonl", rows)
    (tmp_path / "data/b.parquet").write_bytes(b"no parquet")
    report = ingest(run_dir, [str(tmp_path / "data")], CONFIG)
    reasons = {"empty_question": 1, "malformed_json": 1, "remote_image": 1, "unreadable_file": 1}
    assert counts(report) == (8, 3, 1, reasons)
    assert [(f.reason, f.row) for f in quarantined(run_dir) if f.source == str(path)] == [
        ("empty_question", 3),
        ("malformed_json", 4),
        ("remote_image", 5),
    ]


def mixed_folder(folder: Path) -> Path:
    """A folder with a reject in one file, a tar that is cut, and a file that is none."""
    write_jsonl(folder / "a.jsonl", [*numbers(0, 3), {"idx": 9, "question": ""}])
    tar = folder / "b.tar"
    write_shard(tar, 0, [make_sample(i) for i in range(10, 40)])
    os.truncate(tar, tar.stat().st_size * 2 // 3)
    (folder / "c.parquet").write_bytes(b"no parquet")
    return folder


def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on."""
    names: list[str] = []
    read_file = readers_module.read_file

    def watched(file, *more):
        names.append(Path(file.path).name)
        return read_file(file, *more)

    monkeypatch.setattr(readers_module, "read_file", watched)
    return names


def test_only_the_unreadable_files_of_an_input_are_tried_again(run_dir, tmp_path, monkeypatch):
    """All of the input was read again, hours long, by each worker of each launch in turn."""
    source = str(mixed_folder(tmp_path / "data"))
    ingest(run_dir, [source], CONFIG)
    first, rejects = Manifest.load(run_dir).inputs[source], quarantined(run_dir)
    num_cut = first.unreadable[f"{source}/b.tar"].read - 1
    assert first.rejected == {"empty_question": 1, "unreadable_file": 2}
    assert first.read == 4 + num_cut + 2
    names = files_read(monkeypatch)
    report = ingest(run_dir, [source], CONFIG)
    assert names == ["b.tar", "c.parquet"]
    assert counts(report) == (num_cut + 2, 0, num_cut, {"unreadable_file": 2})
    again = Manifest.load(run_dir).inputs[source]
    assert (again.read, again.rejected) == (first.read, first.rejected)
    assert (again.added, again.known) == (3, num_cut)
    assert quarantined(run_dir) == rejects
    assert ids_of(run_dir)[:3] == ["0", "1", "2"] and len(ids_of(run_dir)) == 3 + num_cut


def test_a_mended_file_makes_the_input_whole(run_dir: RunDir, tmp_path: Path):
    source = mixed_folder(tmp_path / "data")
    ingest(run_dir, [str(source)], CONFIG)
    cut = files.version_of(source / "b.tar")
    write_shard(source / "b.tar", 0, [make_sample(i) for i in range(10, 40)], over=cut)
    write_parquet(source / "c.parquet", numbers(50, 52))
    report = ingest(run_dir, [str(source)], CONFIG)
    assert report.rejected == {"empty_question": 1}
    assert sorted(map(int, ids_of(run_dir))) == [*range(3), *range(10, 40), 50, 51]
    assert counts(ingest(run_dir, [str(source)], CONFIG)) == (0, 0, 0, {})


@pytest.mark.parametrize("damage", ["lost", "torn"])
def test_without_its_quarantine_file_an_input_is_read_as_a_whole(run_dir, tmp_path, damage):
    source = str(mixed_folder(tmp_path / "data"))
    ingest(run_dir, [source], CONFIG)
    rejects = quarantined(run_dir)
    (path,) = run_dir.quarantine_dir.iterdir()
    path.unlink() if damage == "lost" else path.write_bytes(path.read_bytes()[:-9])
    ingest(run_dir, [source], CONFIG)
    assert quarantined(run_dir) == rejects


def test_with_max_samples_an_input_is_read_as_a_whole(run_dir, tmp_path, monkeypatch):
    source = str(mixed_folder(tmp_path / "data"))
    few = InputConfig(samples_per_shard=4, max_samples=100)
    ingest(run_dir, [source], few)
    names = files_read(monkeypatch)
    ingest(run_dir, [source], few)
    assert names == ["a.jsonl", "b.tar", "c.parquet"]


def test_nodes_that_see_one_file_with_different_times_read_it_once_each(run_dir, tmp_path: Path):
    """Each launch read it again from its start, as the other node's time was the last one noted."""
    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 3))
    reports = []
    for time in (1000, 2000, 1000, 2000):
        os.utime(path, (time, time))
        reports.append(ingest(run_dir, [str(path)], CONFIG).read)
    assert reports == [3, 3, 0, 0]


def test_progress_reaches_the_caller_who_may_stop(run_dir: RunDir, tmp_path: Path):
    class TooManyBad(Exception):
        pass

    def watch(report: IngestReport) -> None:
        seen.append(report.read)
        if sum(report.rejected.values()) > 60:
            raise TooManyBad

    seen: list[int] = []
    bad = [{"idx": i, "question": ""} for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", [*numbers(0, 5), *bad])
    with pytest.raises(TooManyBad):
        ingest(run_dir, [str(path)], CONFIG, on_progress=watch)
    assert seen[0] <= 5 and seen[-1] == 100
    (unfinished,) = run_dir.quarantine_dir.glob("input-*-unfinished.jsonl")
    assert len(list(read_quarantine(unfinished))) == 95
    assert not Manifest.load(run_dir).is_read(str(path), input_fingerprint(str(path)))
    assert counts(ingest(run_dir, [str(path)], CONFIG))[:2] == (205, 5)
    assert not files.exists(unfinished) and len(quarantined(run_dir)) == 200


def test_what_an_interrupted_input_added_is_known_to_the_next_input(run_dir, tmp_path: Path):
    """Its marks end with its own reading, even where the input has lost those rows since."""
    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 8))
    with pytest.raises(KeyboardInterrupt):
        ingest(run_dir, [str(path)], CONFIG, on_progress=interrupt_at(8))
    assert len(ids_of(run_dir)) == 4
    write_jsonl(path, numbers(0, 2))
    other = write_jsonl(tmp_path / "b.jsonl", numbers(2, 6))
    assert counts(ingest(run_dir, [str(path)], CONFIG)) == (2, 2, 0, {})
    assert counts(ingest(run_dir, [str(other)], CONFIG)) == (4, 2, 2, {})

    root = RunDir(tmp_path / "together")
    write_jsonl(path, numbers(0, 8))
    with pytest.raises(KeyboardInterrupt):
        ingest(root, [str(path)], CONFIG, on_progress=interrupt_at(8))
    write_jsonl(path, numbers(0, 2))
    assert counts(ingest(root, [str(path), str(other)], CONFIG)) == (6, 4, 2, {})


def interrupt_at(num_read: int):
    def interrupt(report: IngestReport) -> None:
        if report.read >= num_read:
            raise KeyboardInterrupt

    return interrupt


def test_the_caller_can_stop_before_a_shard_is_put_in_place(run_dir: RunDir, tmp_path: Path):
    """A process that lost its lease while it was paused must not overwrite a shard."""

    class LeaseLost(Exception):
        pass

    def stop(report: IngestReport) -> None:
        raise LeaseLost

    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 4))
    with pytest.raises(LeaseLost):
        ingest(run_dir, [str(path)], CONFIG, on_progress=stop)
    assert files.list_files(run_dir.shards_dir) == []


def test_counts_that_do_not_add_up_are_refused(run_dir: RunDir, tmp_path: Path, monkeypatch):
    """A shard writer that swallows a sample is noticed."""
    write_shard = ingest_module.write_shard

    def lossy(path, index, samples, *, over):
        samples = list(samples)
        return write_shard(path, index, samples[:-1] if index == 1 else samples, over=over)

    monkeypatch.setattr(ingest_module, "write_shard", lossy)
    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 10))
    with pytest.raises(ConservationError, match="added 9"):
        ingest(run_dir, [str(path)], CONFIG)
    assert Manifest.load(run_dir).inputs == {}


def test_a_run_of_ten_thousand_shards_is_taken_up(run_dir: RunDir, tmp_path: Path):
    """Loading keeps an offset per shard; known samples come from the manifest alone."""
    run_dir.shards_dir.mkdir(parents=True)
    with open(run_dir.manifest, "wb") as file:
        for index in range(10_000):
            ids = [f"{index}-{i}" for i in range(8)]
            keys = [f"{index * 8 + i:032x}" for i in range(8)]
            shard = {"index": index, "num_samples": 8, "num_bytes": 1, "sha256": "0"}
            line = {
                "kind": "shard",
                "shard": {**shard, "keys": keys, "ids": ids},
                "source": str(tmp_path / "a.jsonl"),
            }
            file.write(json.dumps(line).encode() + b"\n")
    rows = [make_row(1), {**make_row(2), "idx": "9999-7"}]
    report = ingest(run_dir, [str(write_jsonl(tmp_path / "a.jsonl", rows))], CONFIG)
    assert counts(report) == (2, 1, 0, {"changed_row": 1})
    manifest = Manifest.load(run_dir)
    assert len(manifest.shards) == 10_001
    assert manifest.shards[9_999].ids[-1] == "9999-7"
    assert msgspec.json.decode(run_dir.manifest_part(1).read_bytes().splitlines()[-1])["added"] == 1


def test_a_temporary_folder_that_cannot_be_used_is_one_clear_line(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = str(write_jsonl(tmp_path / "a.jsonl", numbers(0, 3)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="set TMPDIR to a folder"):
        ingest(run_dir, [source], CONFIG)
    monkeypatch.undo()
    connect = sqlite3.connect

    def full(*arguments, **options):
        database = connect(*arguments, **options)
        database.execute("PRAGMA max_page_count=1")
        return database

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(ConfigError, match=r"is full.*set TMPDIR to a folder"):
        ingest(run_dir, [source], CONFIG)
    monkeypatch.undo()
    assert ingest(run_dir, [source], CONFIG).added == 3
