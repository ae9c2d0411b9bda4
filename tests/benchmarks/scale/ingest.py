"""Rows read into shards: rows a second, memory, and an append of 1 %, beside tar and other tools.

The input is parquet with a small picture in each row (a PNG of 8 x 8 pixels). `rows_known_already`
reads the same rows from a file of another name: each is looked up and nothing is written.
`webdataset` is its ShardWriter fed from the same file by pyarrow, which checks no picture and knows
no sample of before; `tar` packs the very shards that came of it, which are the same bytes. With
`--peers_python` the same rows go through the tools of `peers.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stream_engine.config import InputConfig
from stream_engine.inputs.ingest import ingest
from stream_engine.run_dir.paths import RunDir
from tests.benchmarks.scale import peers
from tests.benchmarks.scale.measuring import Figures, Keep, measured, module
from tests.benchmarks.scale.synthesis import SHARD, picture

THIS = "tests.benchmarks.scale.ingest"
ROWS_OF_A_GROUP = 1_000
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCHEMA = pa.schema({"idx": pa.string(), "question": pa.string(), "image": IMAGE})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000])
    parser.add_argument("--peers_python", help="that has ray[data], datatrove, img2dataset")
    parser.add_argument("--peers_up_to", type=int, default=10_000, help="rows, for these")


def measure(arguments: argparse.Namespace, keep: Keep) -> Figures:
    """All sizes, one after the other."""
    figures: Figures = {"sizes": []}
    for num_rows in arguments.rows:
        folder = Path(tempfile.mkdtemp(prefix=f"ingest-{num_rows}-", dir=arguments.workdir))
        try:
            figures["sizes"].append(measure_size(folder, num_rows))
            if arguments.peers_python and num_rows <= arguments.peers_up_to:
                figures["sizes"][-1]["peers"] = of_peers(folder, num_rows, arguments.peers_python)
        finally:
            shutil.rmtree(folder)
        keep(figures)
    return figures


def measure_size(folder: Path, num_rows: int) -> Figures:
    """One size: the whole input, 1 % more of another, the same again, and what others take."""
    whole, more, run = folder / "whole.parquet", folder / "more.parquet", folder / "run"
    copy = folder / "copy.parquet"
    write_parquet(whole, 0, num_rows)
    copy.hardlink_to(whole)
    write_parquet(more, num_rows, num_rows // 100)
    steps: dict[str, tuple[str, Path, Path, int]] = {
        "ingest": ("ingest", whole, run, num_rows),
        "append_of_1_percent": ("ingest", more, run, num_rows // 100),
        "same_input_again": ("ingest", whole, run, 0),
        "rows_known_already": ("ingest", copy, run, num_rows),
        "webdataset": ("webdataset", whole, folder / "webdataset", num_rows),
    }
    figures: Figures = {"rows": num_rows}
    for name, (what, source, target, rows) in steps.items():
        figures[name] = with_rate(measured(module(THIS, what, source, target)), rows)
    started = time.monotonic()
    tar = ["tar", "cf", str(folder / "all.tar"), "-C", str(run), "shards"]
    figures["tar"] = {**measured([*tar_then_say(tar)]), "with_start_s": 0.0}
    figures["tar"]["with_start_s"] = round(time.monotonic() - started, 1)
    figures["shards_mib"] = round(sum(f.stat().st_size for f in (run / "shards").iterdir()) / 2**20)
    return figures


def of_peers(folder: Path, num_rows: int, python: str) -> Figures:
    """What other tools take for the same rows; the reason where one did not end well."""
    figures: Figures = {}
    for name in peers.TOOLS:
        command = [python, peers.__file__, name, str(folder / "whole.parquet"), str(folder / name)]
        try:
            figures[name] = with_rate(measured(command), num_rows)
        except subprocess.CalledProcessError as error:
            figures[name] = {"failed": f"exit status {error.returncode}"}
    return figures


def tar_then_say(command: list[str]) -> list[str]:
    """A command that runs another, and then prints the JSON object that `measured` wants."""
    program = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True); print('{}')"
    return ["python3", "-c", program, *command]


def with_rate(figures: Figures, rows: int) -> Figures:
    """Rows a second, by the wall clock of the step itself and by its CPU seconds."""
    if rows:
        figures["rows_per_s"] = round(rows / max(figures["step_s"], 1e-3))
        figures["rows_per_cpu_s"] = round(rows / max(figures["step_cpu_s"], 1e-3))
    return figures


def write_parquet(path: Path, first: int, num_rows: int) -> None:
    """Rows from number `first` on."""
    rng = random.Random(first)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(first, first + num_rows, ROWS_OF_A_GROUP):
            numbers = range(start, min(start + ROWS_OF_A_GROUP, first + num_rows))
            rows = [
                {
                    "idx": str(number),
                    "question": f"What is in picture {number}?",
                    "image": {"bytes": picture(rng), "path": f"{number}.png"},
                }
                for number in numbers
            ]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(ROWS_OF_A_GROUP):
        yield from batch.to_pylist()


def by_engine(source: Path, target: Path) -> None:
    ingest(RunDir(target), [str(source)], InputConfig(samples_per_shard=SHARD))


def by_webdataset(source: Path, target: Path) -> None:
    from webdataset import ShardWriter

    target.mkdir()
    with ShardWriter(f"{target}/%06d.tar", maxcount=SHARD, verbose=0) as writer:
        for row in rows_of(source):
            content = {"idx": row["idx"], "question": row["question"]}
            members = {"json": json.dumps(content).encode(), "png": row["image"]["bytes"]}
            writer.write({"__key__": row["idx"], **members})


def main() -> None:
    """One step in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=["ingest", "webdataset"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    started, cpu = time.monotonic(), time.process_time()
    step = by_engine if arguments.step == "ingest" else by_webdataset
    step(arguments.source, arguments.target)
    seconds = {"step_s": time.monotonic() - started, "step_cpu_s": time.process_time() - cpu}
    print(json.dumps({name: round(value, 2) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
