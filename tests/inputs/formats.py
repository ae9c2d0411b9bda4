"""The same rows in every format that is read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa

from stream_engine.inputs.readers import read_samples
from stream_engine.records import Failure, Sample
from tests.samples import Row, input_config, write_jsonl, write_parquet


def read(source: str | Path, **settings) -> list[Sample | Failure]:
    return list(read_samples(str(source), input_config(**settings)))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(path: Path, rows: list[Row]) -> Path:
    members = {}
    for i, row in enumerate(rows):
        stored = {name: value for name, value in row.items() if name != "image"}
        members[f"{i:05d}.json"] = json.dumps(stored).encode()
        if row.get("image"):
            members[f"{i:05d}.png"] = row["image"]["bytes"]
    return write_tar(path, members)


def write_saved_dataset(path: Path, rows: list[Row]) -> Path:
    import datasets

    dataset = datasets.Dataset.from_list(rows)
    dataset.cast_column("image", datasets.Image()).save_to_disk(str(path), num_shards=2)
    return path


def write_feather(path: Path, rows: list[Row]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


WRITERS = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.tar": write_webdataset,
    "a.tar.gz": write_webdataset,
    "saved": write_saved_dataset,
    "a.arrow": write_feather,
}
