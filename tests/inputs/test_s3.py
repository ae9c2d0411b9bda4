"""Inputs on S3, read from a real S3 server through the environment that a user would set."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from stream_engine.errors import ConfigError
from stream_engine.inputs.sources import list_inputs
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import read_shard, write_shard
from tests.samples import make_row, make_sample, picture, write_jsonl, write_parquet

INGEST = """
import sys
from stream_engine.config import InputConfig
from stream_engine.inputs.ingest import ingest
from stream_engine.run_dir.paths import RunDir
print(ingest(RunDir(sys.argv[1]), sys.argv[2:], InputConfig(samples_per_shard=8)).read)
"""


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def environment(endpoint: str) -> dict[str, str]:
    return {
        **os.environ,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def upload(endpoint: str, files: dict[str, Path]) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="bucket")
    for name, path in files.items():
        client.upload_file(str(path), "bucket", name)


def run_ingest(run_dir: RunDir, sources: list[str], environment: dict[str, str]) -> int:
    finished = subprocess.run(
        [sys.executable, "-c", INGEST, str(run_dir.root), *sources],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(finished.stdout)


def test_every_format_is_read_from_s3_and_read_once(endpoint, environment, run_dir, tmp_path):
    write_shard(tmp_path / "b.tar", 0, [make_sample(i) for i in range(20, 25)])
    (tmp_path / "c.png").write_bytes(picture(30))
    lines = [{"idx": 30, "question": "?", "image_path": "images/c.png"}]
    upload(
        endpoint,
        {
            "data/a.parquet": write_parquet(
                tmp_path / "a.parquet", [make_row(i) for i in range(20)]
            ),
            "data/tars/b.tar": tmp_path / "b.tar",
            "more/c.jsonl": write_jsonl(tmp_path / "c.jsonl", lines),
            "more/images/c.png": tmp_path / "c.png",
        },
    )
    sources = ["s3://bucket/data", "s3://bucket/more/*.jsonl"]
    assert run_ingest(run_dir, sources, environment) == 26
    manifest = Manifest.load(run_dir)
    assert list(manifest.inputs) == sources
    samples = [
        sample for info in manifest.shards for sample in read_shard(run_dir.shard(info.index), info)
    ]
    assert [sample.idx for sample in samples] == [str(i) for i in (*range(25), 30)]
    assert samples[-1].images[0].data == picture(30)
    assert samples[21].key == make_sample(21).key
    assert run_ingest(run_dir, sources, environment) == 0


READ_NOTHING = """
import time
from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.inputs.images import read_image_file
from stream_engine.inputs.sources import InputFile
from stream_engine.inputs.readers import read_file
time.sleep = lambda wait_s: None
file = InputFile(path="s3://bucket/a.jsonl", format="jsonl", size=9, version="")
print([row.item.reason for row in read_file(file, InputConfig(), {})])
try:
    read_image_file("a.png", "s3://bucket", None, 100)
except RecordError as error:
    print(error.reason)
"""


def test_a_store_that_cannot_be_reached_is_named_and_ends_nothing(environment):
    """botocore's errors are no OSErrors: ingest ended with a traceback."""
    environment |= {"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", READ_NOTHING], env=environment, capture_output=True, text=True
    )
    assert finished.stdout == "['unreadable_file']\nunreachable_image\n", finished.stderr


def test_missing_credentials_are_a_config_error(monkeypatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="s3://"):
        list_inputs("s3://no-such-bucket-anywhere/data.parquet")
