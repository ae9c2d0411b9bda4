"""What identifies a checkpoint on disk, without torch and without reading all of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stream_engine.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".bin")
SMALL_FILE_SUFFIXES = (".json", ".model", ".txt", ".jinja")
SAMPLED_BYTES = 1 << 16


def checkpoint_fingerprint(path: str | Path) -> str:
    """16 hex digits over a checkpoint's configuration, tokenizer and weight files.

    Small files count whole. Of a weight file count its size and its first, middle and last 64 KiB
    (the first hold a safetensors file's header: every tensor's name, dtype and shape), so that a
    14 GB checkpoint takes milliseconds. Copies of one checkpoint agree wherever they lie.

    Raises:
        CheckpointError: when the directory or its config.json is missing.
    """
    root = Path(path)
    if not (root / "config.json").is_file():
        what = "has no config.json" if root.is_dir() else "is not a directory"
        raise CheckpointError(f"{root} {what}; give the folder of a downloaded checkpoint")
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        if file.suffix in SMALL_FILE_SUFFIXES:
            digest.update(f"{file.relative_to(root)}\0".encode())
            digest.update(hashlib.blake2b(file.read_bytes()).digest())
        elif file.suffix in WEIGHT_SUFFIXES:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
            with file.open("rb") as stream:
                for start in sorted({0, size // 2, max(0, size - SAMPLED_BYTES)}):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()
