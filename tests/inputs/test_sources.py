import json
import os
from pathlib import Path

import fsspec
import pytest

from stream_engine.errors import ConfigError
from stream_engine.inputs.sources import find_inputs, input_fingerprint, list_inputs
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import write_shard
from stream_engine.store.locations import canonical_source
from tests.samples import make_row, make_sample, write_jsonl, write_parquet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "data/b.parquet", [make_row(0)])
    write_jsonl(tmp_path / "data/a.jsonl", [make_row(1)])
    write_jsonl(tmp_path / "data/deep/c.jsonl", [make_row(2)])
    for name in (".hidden.jsonl", "_partial.jsonl", "notes.txt", ".x/d.jsonl", "_tmp/e.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("{}")
    return tmp_path / "data"


def names(source: str | Path) -> list[str]:
    return [Path(file.path).name for file in list_inputs(str(source))]


def test_a_folder_is_searched_for_known_suffixes_in_sorted_order(folder: Path):
    assert names(folder) == ["a.jsonl", "b.parquet", "c.jsonl"]
    assert [file.format for file in list_inputs(str(folder))] == ["jsonl", "parquet", "jsonl"]


def test_a_hidden_folder_is_read_when_it_is_named(folder: Path):
    assert names(folder / ".x") == ["d.jsonl"]


def test_a_glob_matches_files_and_folders_that_are_not_hidden(folder: Path):
    assert names(folder / "*.jsonl") == ["a.jsonl"]
    assert names(folder / "**/*.jsonl") == ["a.jsonl", "c.jsonl"]
    assert names(folder / "dee?") == ["c.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path):
    write_jsonl(tmp_path / "a[1].jsonl", [make_row(0)])
    write_jsonl(tmp_path / "a1.jsonl", [make_row(0)])
    assert names(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]


def test_relative_paths_and_home_folders_become_absolute(folder: Path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert canonical_source("data/") == str(folder)
    assert names("data") == names("~/data") == names(folder)
    assert canonical_source("s3://bucket/data/") == "s3://bucket/data"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("missing.parquet", "does not exist", id="missing"),
        pytest.param("*.parquet", "does not exist", id="empty-glob"),
        pytest.param("notes.txt", "cannot tell the format", id="suffix"),
        pytest.param("empty", "no file with a known suffix", id="empty-folder"),
        pytest.param("nosuch://x/y", "nosuch", id="protocol"),
    ],
)
def test_sources_that_hold_nothing_are_named(tmp_path: Path, monkeypatch, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").write_text("")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        list_inputs(source)


def test_caches_beside_a_saved_dataset_are_not_data(tmp_path: Path):
    import datasets

    dataset = datasets.Dataset.from_list([{"question": f"q{i}"} for i in range(10)])
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    shards = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (tmp_path / "saved/cache-1234.arrow").write_bytes(b"")
    assert names(tmp_path / "saved") == shards
    (tmp_path / "saved/state.json").unlink()
    assert names(tmp_path / "saved") == shards


def test_every_split_of_a_saved_dataset_dict_is_read(tmp_path: Path):
    import datasets

    dataset = datasets.Dataset.from_list([{"question": "q"}])
    datasets.DatasetDict(test=dataset, train=dataset).save_to_disk(str(tmp_path / "saved"))
    folders = [Path(file.path).parent.name for file in list_inputs(str(tmp_path / "saved"))]
    assert folders == ["test", "train"]


def test_the_manifest_beside_a_runs_shards_is_not_data(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write_shard(run_dir.shard(0), 0, [make_sample(0)])
    run_dir.manifest.write_text("{}")
    run_dir.manifest_part(1).write_text("{}")
    assert names(run_dir.shards_dir) == ["000000.tar"]


def test_fingerprint_changes_with_content_time_and_number_of_files(folder: Path):
    before = input_fingerprint(str(folder))
    assert input_fingerprint(f"{folder}/") == before
    (folder / "notes.txt").write_text("not data")
    assert input_fingerprint(str(folder)) == before

    os.utime(folder / "a.jsonl", (1, 1))
    touched = input_fingerprint(str(folder))
    (folder / "a.jsonl").write_text("")
    os.utime(folder / "a.jsonl", (1, 1))
    emptied = input_fingerprint(str(folder))
    write_jsonl(folder / "z.jsonl", [])
    assert len({before, touched, emptied, input_fingerprint(str(folder))}) == 4


def test_urls_of_any_file_system_are_listed():
    fs = fsspec.filesystem("memory")
    fs.pipe("/inputs/b.jsonl", b"{}")
    fs.pipe("/inputs/deep/a.parquet", b"")
    paths = [file.path for file in list_inputs("memory://inputs")]
    assert paths == ["memory:///inputs/b.jsonl", "memory:///inputs/deep/a.parquet"]
    assert [file.path for file in list_inputs("memory://inputs/*.jsonl")] == paths[:1]
    assert [file.path for file in list_inputs("memory://inputs/b.jsonl")] == paths[:1]
    with pytest.raises(ConfigError, match="does not exist"):
        list_inputs("memory://inputs/c.jsonl")


def test_braces_stand_for_names(folder: Path):
    assert names(f"{folder}/{{a,deep/c}}.jsonl") == ["a.jsonl", "c.jsonl"]
    with pytest.raises(ConfigError, match=r"of which .*/d\.jsonl does not exist"):
        names(f"{folder}/{{a,d}}.jsonl")


def test_parts_that_are_missing_are_told(tmp_path: Path):
    for number in (0, 3):
        write_parquet(tmp_path / f"train-{number:05d}-of-00004.parquet", [make_row(number)])
    missing = [name for name, what in find_inputs(str(tmp_path)).others if "missing" in what]
    assert [Path(name).name[6:11] for name in missing] == ["00001", "00002"]
    assert find_inputs(f"{tmp_path}/train-00000-of-00004.parquet").others == []


def test_a_saved_dataset_that_lost_a_file_is_refused(tmp_path: Path):
    """Its rows were left out in silence."""
    (tmp_path / "data-00000-of-00002.arrow").touch()
    listed = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    with pytest.raises(ConfigError, match=r"names data-00001-of-00002\.arrow, which is not there"):
        find_inputs(str(tmp_path))


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path):
    with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "w"):
        pass
    with pytest.raises(ConfigError, match="not UTF-8"):
        list_inputs(str(tmp_path))


@pytest.mark.parametrize("source", ["", "*", "r*"])
def test_a_run_that_lies_within_its_input_is_not_read(tmp_path: Path, source: str):
    """Each command read the leases, rejects and shards of its own run as new rows."""
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "?"}])
    for name in ("run.json", "leases/ingest.json", "quarantine/a.jsonl", "dataset/train.parquet"):
        path = tmp_path / "run/here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    found = find_inputs(f"{tmp_path}/{source}")
    assert [file.path for file in found.files] == [f"{tmp_path}/rows.jsonl"]
    assert found.others == [(f"{tmp_path}/run/here/", "folders of runs")]
    assert len(find_inputs(f"{tmp_path}/run/here").files) > 1  # named by itself
    with pytest.raises(ConfigError, match="folders of runs are not read"):
        find_inputs(f"{tmp_path}/run")


def test_a_pipe_is_no_input(folder: Path):
    """Who opens a pipe into which nobody writes waits for ever."""
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(ConfigError, match="is a pipe or device: write it to a file first"):
        list_inputs(str(folder / "pipe.jsonl"))
    assert str(folder / "pipe.jsonl") not in [file.path for file in list_inputs(str(folder))]
