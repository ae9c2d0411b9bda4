"""python tests/launch/nudge.py DATASET MODEL OUT: a trainer that takes a second.

Writes MODEL with its weights nudged to OUT, and a line to the file that NUDGED names. While the
file that HOLD names is there, it waits before it is done.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file


def main() -> None:
    dataset, model, out = map(Path, sys.argv[1:])
    num_pairs = sum(pq.read_metadata(part).num_rows for part in dataset.glob("*.parquet"))
    shutil.copytree(model, out, dirs_exist_ok=True)
    (out / "begun").touch()
    while Path(os.environ["HOLD"]).exists():
        time.sleep(0.05)
    weights = load_file(model / "model.safetensors")
    nudged = {name: (tensor * 1.01).astype(tensor.dtype) for name, tensor in weights.items()}
    save_file(nudged, out / "model.safetensors", metadata={"format": "pt"})
    with open(os.environ["NUDGED"], "a", encoding="utf-8") as log:
        log.write(f"{out.name} {model.name} {num_pairs > 0}\n")


if __name__ == "__main__":
    main()
