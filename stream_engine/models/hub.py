"""Models of the Hugging Face hub: fetched once into its cache, then folders like any others.

    Qwen/Qwen2.5-VL-7B-Instruct             the default branch
    Qwen/Qwen2.5-VL-7B-Instruct@v1.0        a branch, tag or commit

The processes of a node take turns: the first fetches, with a progress bar, and the others find the
files. Of weights only safetensors are fetched, and no code. huggingface_hub comes with
transformers; its cache, offline switch (HF_HUB_OFFLINE) and token are honoured.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from stream_engine.config import RunConfig
from stream_engine.errors import CheckpointError, ConfigError
from stream_engine.store.locations import is_hub_model
from stream_engine.text import one_line

PATTERNS: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"],
    "ignore_patterns": ["original/*", "consolidated*", "onnx/*"],  # for other programs
}
"""What is fetched of a repository: one set of weights, and what belongs to it."""
SETTINGS = (
    "instruct_model_path",
    "reward_model_path",
    "base_model_path",
    "vision_tower_path",
)


def with_checkpoints(config: RunConfig) -> RunConfig:
    """The settings with a folder in the place of each model of the hub, which is fetched now.

    Raises:
        ConfigError: when one can neither be fetched nor is in the cache.
        CheckpointError: when one has no safetensors.
    """
    given = {name: getattr(config, name) for name in SETTINGS}
    found = {name: with_folders(name, value) for name, value in given.items() if value}
    changed: dict[str, Any] = {n: value for n, value in found.items() if value != given[n]}
    return dataclasses.replace(config, **changed) if changed else config


def with_folders(setting: str, paths: str) -> str:
    """The same of one setting, which may name several models, separated by commas."""
    names = [name.strip() for name in paths.split(",")]
    if not any(map(is_hub_model, names)):
        return paths
    folders = (checkpoint_folder(n, setting=setting) if is_hub_model(n) else n for n in names)
    return ",".join(map(str, folders))


@functools.cache
def checkpoint_folder(name: str, *, setting: str = "model") -> Path:
    """Where a model of the hub lies on disk, fetched when it is not there yet.

    Raises:
        ConfigError: when it can neither be fetched nor is in the cache.
        CheckpointError: when it has no safetensors.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import WeakFileLock

    repo_id, _, revision = name.partition("@")
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locks / f"stream_engine--{re.sub(r'[^A-Za-z0-9.-]+', '--', name)}.lock"
    try:
        with WeakFileLock(lock):
            folder = snapshot_download(repo_id, revision=revision or None, **PATTERNS)
    except (OSError, ValueError) as error:  # what it raises without network, name or right
        raise ConfigError(
            f"{setting} {name!r} is no folder here, and cannot be fetched from the Hugging Face "
            f"hub nor found in its cache ({constants.HF_HUB_CACHE}): {one_line(error)}"
        ) from error
    if not any(Path(folder).rglob("*.safetensors")):
        raise CheckpointError(
            f"{setting} {name!r} has no weights as safetensors, and others are not fetched: "
            "download it yourself and give its folder"
        )
    return Path(folder)


def cached_folder(path: str) -> Path:
    """Where a checkpoint lies on disk; a model of the hub is looked for in its cache alone, and
    where it is not there the path comes back as it is."""
    from huggingface_hub import snapshot_download

    if not is_hub_model(path):
        return Path(path)
    repo_id, _, revision = path.partition("@")
    try:
        folder = snapshot_download(
            repo_id, revision=revision or None, local_files_only=True, **PATTERNS
        )
    except (OSError, ValueError):  # what it raises without one
        return Path(path)
    return Path(folder)
