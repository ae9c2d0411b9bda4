"""Datasets of the Hugging Face hub: fetched once into its cache, then files like any others.

    openbmb/RLAIF-V-Dataset            the whole repository
    openbmb/RLAIF-V-Dataset:train      the files of a split
    hf://datasets/openbmb/RLAIF-V-Dataset/data/a.parquet        a file or folder in it

huggingface_hub comes with transformers; its cache, offline switch (HF_HUB_OFFLINE) and token are
honoured.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from stream_engine.errors import ConfigError
from stream_engine.store.locations import HUB
from stream_engine.text import one_line

SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
"""By which a file's name tells its split; files that name none are of "train"."""


class HubSource(NamedTuple):
    """A dataset of the hub, and what of it is meant."""

    repo_id: str
    split: str
    path: str


def parse_hub(url: str) -> HubSource:
    """The parts of `hf://datasets/owner/name[:split][/path]`.

    Raises:
        ConfigError: for a URL of another form.
    """
    found = re.fullmatch(rf"{HUB}([^/:]+/[^/:]+)(?::([\w.-]+))?(?:/(.*))?", url)
    if found is None:
        raise ConfigError(
            f"dataset_path {url!r}: write {HUB}owner/name, with :split or /path behind it"
        )
    return HubSource(found[1], found[2] or "", found[3] or "")


@functools.cache  # asked for the fingerprint and for each reading
def fetched(url: str) -> Path:
    """Where the dataset lies on disk, fetched when it is not there yet: a folder, or a file of it.

    Raises:
        ConfigError: when it can neither be fetched nor is in the cache.
    """
    from huggingface_hub import constants, snapshot_download

    source = parse_hub(url)
    wanted = [source.path, f"{source.path}/**"] if source.path else None
    try:
        folder = snapshot_download(source.repo_id, repo_type="dataset", allow_patterns=wanted)
    except (OSError, ValueError) as error:  # what it raises without network, name or right
        raise ConfigError(
            f"dataset_path {source.repo_id!r} is no file or folder here, and cannot be fetched "
            f"from the Hugging Face hub nor found in its cache ({constants.HF_HUB_CACHE}): "
            f"{one_line(error)}"
        ) from error
    return Path(folder) / source.path


def split_of(name: str) -> str:
    """The split that a file's path within its repository tells."""
    words = re.split(r"[/_.\-]", name.lower())
    return next((split for split in SPLITS if split in words), "train")
