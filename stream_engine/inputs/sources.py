"""Which files a source is made of, and a fingerprint that tells when they change.

A source is what a user names: a file, a folder, a glob, or any of these as an fsspec URL.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import msgspec
from fsspec import AbstractFileSystem

from stream_engine.errors import ConfigError
from stream_engine.store.locations import folder_of, full_path, open_source, store_errors

Format = Literal["parquet", "jsonl", "arrow", "tar"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".arrow": "arrow",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
}


class InputFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file to read. `path` is absolute, or a URL where the file is not local."""

    path: str
    format: Format
    size: int
    version: str
    """Changes with the content, as far as the file system tells: time of change, or an ETag."""


def list_inputs(source: str) -> list[InputFile]:
    """The files of a source, sorted by path.

    A folder is searched recursively for the known suffixes; names that start with "." or "_" are
    skipped. Of a saved `datasets` folder only the files that its state.json lists are data.

    Raises:
        ConfigError: when nothing is there, the format is unknown or the URL cannot be opened.
    """
    fs, path = open_source(source)
    try:
        infos = find_files(fs, path)
        is_there = bool(infos) or fs.exists(path)
    except store_errors() as error:
        raise ConfigError(f"cannot read dataset_path {source!r}: {error}") from error
    if not infos:
        what = "is an empty folder" if is_there else "does not exist"
        raise ConfigError(f"dataset_path {source!r} {what}")
    is_single = len(infos) == 1 and infos[0]["name"].rstrip("/") == path.rstrip("/")
    files = []
    for info in infos:
        format = file_format(info["name"])
        if format is None:
            if is_single:
                raise ConfigError(
                    f"dataset_path {source!r}: cannot tell the format; "
                    f"known suffixes are {', '.join(FORMATS)}"
                )
            continue
        check_name(info["name"])
        files.append(
            InputFile(
                path=full_path(fs, info["name"]),
                format=format,
                size=int(info.get("size") or 0),
                version=file_version(info),
            )
        )
    try:
        files = without_side_files(fs, sorted(files, key=lambda file: file.path))
    except store_errors() as error:
        raise ConfigError(f"cannot read dataset_path {source!r}: {error}") from error
    if not files:
        raise ConfigError(
            f"dataset_path {source!r} holds no file with a known suffix ({', '.join(FORMATS)})"
        )
    return files


def input_fingerprint(source: str) -> str:
    """Hash of the source's files with their sizes and versions: 32 hex digits.

    Files that an `image_path` points to are not part of it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in list_inputs(source):
        digest.update(msgspec.json.encode(file))
    return digest.hexdigest()


def find_files(fs: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """The fsspec infos of a file, of all files below a folder, or of a glob's matches."""
    if fs.exists(path):
        if not fs.isdir(path):
            return [fs.info(path)]
        return files_below(fs, path)
    fixed, *pattern = re.split(r"/(?=[^/]*[*?\[])", path, maxsplit=1)
    if not pattern:
        return []
    infos: dict[str, dict[str, Any]] = {}
    for match, info in fs.glob(path, detail=True).items():
        if is_hidden(match, fixed):
            continue
        found = files_below(fs, match) if info["type"] == "directory" else [info]
        infos.update((info["name"], info) for info in found)
    return list(infos.values())


def files_below(fs: AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    """The infos of all files below a folder, hidden ones left out."""
    found = fs.find(folder, detail=True)
    return [info for name, info in found.items() if not is_hidden(name, folder)]


def is_hidden(name: str, folder: str) -> bool:
    """Whether a name below a folder, or one between the two, starts with "." or "_"."""
    parts = name[len(folder.rstrip("/")) :].split("/")
    return any(part.startswith((".", "_")) for part in parts)


def without_side_files(fs: AbstractFileSystem, files: list[InputFile]) -> list[InputFile]:
    """Leave out what lies beside data but is none.

    These are caches in a saved `datasets` folder, and the manifest beside a run's own shards.
    """
    tar_folders = {folder_of(file.path) for file in files if file.format == "tar"}
    arrow_folders = {folder_of(file.path) for file in files if file.format == "arrow"}
    listed = {folder: state_files(fs, folder) for folder in arrow_folders}
    kept = []
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if file.format == "arrow":
            names = listed[folder]
            if name.startswith("cache-") if names is None else name not in names:
                continue
        if name == "manifest.jsonl" and folder in tar_folders:
            continue
        kept.append(file)
    return kept


def state_files(fs: AbstractFileSystem, folder: str) -> set[str] | None:
    """The data files that a saved `datasets` folder lists; None when it is no such folder."""
    state_path = f"{folder}/state.json"
    if not fs.exists(state_path):
        return None
    try:
        state = msgspec.json.decode(fs.cat_file(state_path))
        return {entry["filename"] for entry in state["_data_files"]}
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{state_path} is not a saved dataset's state: {error}") from error


def check_name(name: str) -> None:
    """Refuse names that no report could print."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the file name {name!r} is not UTF-8; rename the file") from error


def file_format(name: str) -> Format | None:
    """The format that a file's suffix says, or None."""
    for suffix, format in FORMATS.items():
        if name.lower().endswith(suffix):
            return format
    return None


def file_version(info: dict[str, Any]) -> str:
    """The time of change or tag that a file system gives for a file."""
    for name in ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created"):
        if info.get(name) is not None:
            return str(info[name])
    return ""
