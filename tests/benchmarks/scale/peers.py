"""Other tools on the rows of `ingest.py`: `PYTHON peers.py TOOL whole.parquet FOLDER`.

Runs by a Python that has the tool and needs nothing of this project. What each does with a row is
said at its function; none of them keeps what it knows of earlier inputs. Each sees two cores.
"""

from __future__ import annotations

import argparse
import http.server
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD = 64
"""Rows of a shard, as in `ingest.py`."""
NUM_CORES = 2


def ray_data(source: Path, target: Path) -> None:
    """Parquet to tars of a json and a picture, unchecked; a tar for each block of rows."""
    import ray

    ray.init(num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_parquet(str(source)).map(as_members)
    blocks = rows.repartition(target_num_rows_per_block=SHARD)
    blocks.write_webdataset(str(target), encoder=None)  # members are bytes already
    ray.shutdown()


def as_members(row: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps({"idx": row["idx"], "question": row["question"]})
    return {"__key__": row["idx"], "json": content.encode(), "png": row["image"]["bytes"]}


def datatrove(source: Path, target: Path) -> None:
    """Parquet to parquet: it has no reader or writer of tars, and checks no picture."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter

    names = {"glob_pattern": source.name, "text_key": "question", "id_key": "idx"}
    steps = [ParquetReader(str(source.parent), **names), ParquetWriter(str(target))]
    LocalPipelineExecutor(steps, tasks=1, logging_dir=f"{target}-logs").run()


def img2dataset(source: Path, target: Path) -> None:
    """Pictures fetched by their addresses from a server on this machine, into tars, unchanged.

    A tar for each 1,000, since it starts its processes anew every few tars.
    """
    import pyarrow.parquet as pq
    from img2dataset import download

    pictures: dict[str, bytes] = {}
    for batch in pq.ParquetFile(source).iter_batches():
        pictures.update((row["idx"], row["image"]["bytes"]) for row in batch.to_pylist())
    port = serve(pictures)
    addresses = Path(f"{target}.txt")
    addresses.write_text("".join(f"http://127.0.0.1:{port}/{idx}.png\n" for idx in pictures))
    download(
        url_list=str(addresses),
        output_folder=str(target),
        output_format="webdataset",
        number_sample_per_shard=1000,
        processes_count=NUM_CORES,
        thread_count=16,
        resize_mode="no",
        enable_wandb=False,
    )


def serve(pictures: dict[str, bytes]) -> int:
    """Start to serve them, `/<id>.png`; returns the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = pictures[re.sub(r"^/|[.]png$", "", self.path)]
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "ray_data": ray_data,
    "datatrove": datatrove,
    "img2dataset": img2dataset,
}


def main() -> None:
    """One tool; prints its seconds as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    started, cpu = time.monotonic(), time.process_time()
    TOOLS[arguments.tool](arguments.source, arguments.target)
    seconds = {"step_s": time.monotonic() - started, "step_cpu_s": time.process_time() - cpu}
    print()
    print(json.dumps({name: round(value, 2) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
