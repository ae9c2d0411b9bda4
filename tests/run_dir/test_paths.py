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
    assert run_dir.quarantine("x") == Path("work/quarantine/x.jsonl")
    assert run_dir.stage_quarantine("rewards", 5) == Path("work/quarantine/rewards-000005.jsonl")
    assert run_dir.lease("merge") == Path("work/leases/merge.json")
    assert run_dir.log("rank-0") == Path("work/logs/rank-0.log")
    assert run_dir.stats_json == Path("work/dataset/stats.json")
    assert run_dir.report_html == Path("work/report/index.html")


@pytest.mark.parametrize("url", ["s3://bucket/run", "simplecache::gs://bucket/run", "file:///run"])
def test_a_url_is_no_run_directory(url: str):
    with pytest.raises(ConfigError, match="is a URL"):
        RunDir(url)


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
