"""Names of files, local or by URL: one canonical name for each, and what opens it.

Knows no format and no content.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from stream_engine.errors import ConfigError
from stream_engine.store.transient import network_errors

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

HUB = "hf://datasets/"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w-]*(\.\w+)*(:[\w.-]+)?")

HUB_MODEL = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")

FILE = re.compile(
    r"\.(parquet|jsonl?|ndjson|csv|tsv|arrow|tar|t(?:gz|bz2|xz|zst)|gz|bz2|xz|zst|lz4)$"
)
"""What ends so was meant as a file of this machine."""


def canonical_source(source: str) -> str:
    """The name under which the manifest knows a source: an absolute path, or the URL.

    `owner/name` is a dataset of the Hugging Face hub where no such path exists.
    """
    if is_url(source):
        return source.rstrip("/")
    is_name = HUB_ID.fullmatch(source) and not FILE.search(source)
    if is_name and not os.path.exists(source.partition(":")[0]):
        return f"{HUB}{source}"
    return os.path.abspath(os.path.expanduser(source))


def is_hub_model(path: str) -> bool:
    """Whether a model setting names a model of the Hugging Face hub: `owner/name[@revision]`, where
    no such folder exists."""
    return HUB_MODEL.fullmatch(path) is not None and not os.path.exists(path)


def is_url(path: str) -> bool:
    """Whether a path names its file system (`s3://...`)."""
    return "://" in path or "::" in path


def open_source(source: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it.

    Raises:
        ConfigError: for an unknown protocol, or one whose package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(canonical_source(source))
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"cannot open dataset_path {source!r}: {error} "
            "(s3:// needs the package s3fs, gs:// needs gcsfs: pip install s3fs)"
        ) from error


def store_errors() -> tuple[type[Exception], ...]:
    """What a file system raises."""
    return OSError, ValueError, *network_errors()


def full_path(fs: AbstractFileSystem, name: str) -> str:
    """A path that opens from anywhere: absolute for local files, else with its protocol."""
    from fsspec.implementations.local import LocalFileSystem

    return name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)


def folder_of(path: str) -> str:
    """The folder part of a path or URL."""
    return path.rpartition("/")[0]
