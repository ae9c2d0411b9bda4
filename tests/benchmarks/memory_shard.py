"""Peak memory of sharding N and 10 N samples: it must not grow with the input.

    python -m tests.benchmarks.memory_shard [--samples 2000] [--factor 10] [--format parquet]

Each size is ingested, and its shards read again, in a process of its own. Prints one JSON object;
exits with 1 when the peak grows by 15 % or more.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stream_engine.config import InputConfig
from stream_engine.inputs.ingest import ingest
from stream_engine.records import EncodedImage, Sample, sample_key
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import read_shard, write_shard

MAX_GROWTH = 0.15
IMAGE_SIDE = 320
ROW_GROUP_ROWS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--format", choices=("parquet", "tar"), default="parquet")
    parser.add_argument("--child", nargs=2, metavar=("INPUT", "RUN_DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    sizes = (arguments.samples, arguments.samples * arguments.factor)
    small, large = (run_child(arguments.format, num_samples) for num_samples in sizes)
    growth = large["peak_rss_mb"] / small["peak_rss_mb"] - 1
    print(json.dumps({"small": small, "large": large, "growth": round(growth, 4)}))
    sys.exit(growth >= MAX_GROWTH)


def run_child(format: str, num_samples: int) -> dict[str, float]:
    """Write an input of that size, and shard it in another process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"input.{format}"
        WRITERS[format](path, num_samples)
        command = [sys.executable, "-m", "tests.benchmarks.memory_shard", "--child"]
        finished = subprocess.run(
            [*command, str(path), f"{folder}/run"], check=True, stdout=subprocess.PIPE
        )
        input_mb = round(path.stat().st_size / 1e6, 1)
        return {"samples": num_samples, "input_mb": input_mb, **json.loads(finished.stdout)}


def measure(path: str, root: str) -> dict[str, float]:
    """Shard the input, read the shards again, and tell this process's peak memory."""
    run_dir = RunDir(root)
    start = time.monotonic()
    report = ingest(run_dir, [path], InputConfig())
    seconds = time.monotonic() - start
    num_read = sum(
        1
        for info in Manifest.load(run_dir).shards
        for _ in read_shard(run_dir.shard(info.index), info)
    )
    assert num_read == report.added == report.read
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_mb": round(peak_kib / 1024, 1), "ingest_s": round(seconds, 1)}


def make_images(num_samples: int) -> Iterator[bytes]:
    """Different JPEGs of about 60 kB; what follows a JPEG's end is not decoded."""
    buffer = io.BytesIO()
    Image.effect_noise((IMAGE_SIDE, IMAGE_SIDE), 60).convert("RGB").save(buffer, "JPEG", quality=90)
    for i in range(num_samples):
        yield buffer.getvalue() + i.to_bytes(8, "little")


def write_parquet(path: Path, num_samples: int) -> None:
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"idx": pa.int64(), "question": pa.string(), "image": image_type})
    rows: list[dict] = []
    with pq.ParquetWriter(path, schema) as writer:
        for i, data in enumerate(make_images(num_samples)):
            rows.append({"idx": i, "question": f"What is in {i}?", "image": {"bytes": data}})
            if len(rows) == ROW_GROUP_ROWS or i + 1 == num_samples:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()


def write_tar(path: Path, num_samples: int) -> None:
    write_shard(
        path,
        0,
        (
            Sample(
                key=sample_key(str(i), "What is this?", (EncodedImage(data),)),
                idx=str(i),
                question="What is this?",
                images=(EncodedImage(data),),
            )
            for i, data in enumerate(make_images(num_samples))
        ),
    )


WRITERS = {"parquet": write_parquet, "tar": write_tar}

if __name__ == "__main__":
    main()
