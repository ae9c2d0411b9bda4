"""Whether the files of a checkpoint are what their names say, before any library reads them.

A clone without Git LFS holds pointers in place of files; a download that broke off leaves empty
files, or zeros. Each library says that in words of its own, far from the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stream_engine.errors import CheckpointError
from stream_engine.text import LFS_POINTER

WEIGHTS = (".safetensors", ".bin", ".model")
TEXTS = (".json", ".jinja", ".txt")
OBJECTS = frozenset(
    (
        *("config.json", "generation_config.json", "preprocessor_config.json"),
        *("processor_config.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.json", "tokenizer.json", "vocab.json"),
        *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    )
)
"""JSON files that hold one object."""
HEAD_BYTES = 64
MAX_PARSED = 1 << 20
"""Larger ones are left to their library; of an object the first letter tells."""


def refuse_broken_files(checkpoint: Path) -> None:
    """Raise CheckpointError for the first file of a checkpoint that cannot be what it should."""
    if checkpoint.is_dir():
        for path in sorted(checkpoint.iterdir()):
            if path.suffix in WEIGHTS + TEXTS and path.is_file():
                refuse_broken_file(path)


def refuse_broken_file(path: Path) -> None:
    """Raise CheckpointError, with what helps, for a pointer, an empty file, zeros, foreign JSON."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            size = path.stat().st_size
            rest = file.read() if path.name in OBJECTS and size <= MAX_PARSED else b""
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    again = "download it again"
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}"
        )
    if not head and (path.suffix in WEIGHTS or path.name in OBJECTS):
        raise CheckpointError(f"{path} is empty; {again}")
    if head and not head.strip(b"\0"):
        raise CheckpointError(f"{path} holds zeros, its download broke off; {again}")
    if path.name not in OBJECTS:
        return
    if head.lstrip(b" \t\r\n\xef\xbb\xbf")[:1] != b"{":
        raise CheckpointError(f"{path} does not hold a JSON object; {again}")
    try:
        if size <= MAX_PARSED:
            json.loads((head + rest).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {again}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file of a checkpoint as a dict; {} where there is none.

    Raises:
        CheckpointError: when it cannot be read as JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again")
    return content
