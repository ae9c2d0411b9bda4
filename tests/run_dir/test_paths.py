from pathlib import Path

import pytest

from stream_engine.errors import ConfigError
from stream_engine.run_dir.paths import RunDir


def test_paths_are_those_of_the_layout():
    run_dir = RunDir("work")
    assert run_dir.shard(12) == Path("work/shards/000012.tar")
    assert run_dir.manifest == Path("work/shards/manifest.jsonl")
    assert run_dir.result("rollouts", 7) == Path("work/results/rollouts/000007.msgpack")
    assert run_dir.failure(3) == Path("work/failures/000003.json")
    assert run_dir.manifest_part(1) == Path("work/shards/manifest-00001.jsonl")
    assert run_dir.quarantine("x.jsonl") == Path("work/quarantine/x.jsonl")
    assert run_dir.lease("merge") == Path("work/leases/merge.json")
    assert run_dir.log("rank-0") == Path("work/logs/rank-0.log")
    assert run_dir.stats_json == Path("work/dataset/stats.json")
    assert run_dir.report_html == Path("work/report/index.html")


@pytest.mark.parametrize(
    "url",
    ["simplecache::gs://bucket/run", "file:///run", "https://x/run", "s3://", "s3://b/../run"],
)
def test_a_url_that_cannot_be_written_to_is_no_run_directory(url: str):
    with pytest.raises(ConfigError):
        RunDir(url)


def test_a_run_may_be_in_an_object_store():
    run_dir = RunDir("s3://bucket/a//run/")
    assert str(run_dir.root) == "s3://bucket/a/run"
    assert str(run_dir.shard(12)) == "s3://bucket/a/run/shards/000012.tar"
    assert (run_dir.shard(12).stem, run_dir.shard(12).suffix) == ("000012", ".tar")
    assert run_dir.shard(12).parent == run_dir.shards_dir


def test_each_format_has_a_folder_of_its_own():
    run_dir = RunDir("work")
    assert run_dir.dataset_folders(["trl", "rlaifv"]) == {
        "trl": Path("work/dataset"),
        "rlaifv": Path("work/dataset_rlaifv"),
    }


def test_asking_for_paths_creates_nothing(tmp_path: Path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.shard(0), run_dir.result("rewards", 0), run_dir.lease("x")
    assert not run_dir.root.exists()
