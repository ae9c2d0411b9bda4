"""Which files a source is made of, and a fingerprint that tells when they change.

A source is what a user names: a file, a folder, a glob (braces too), any of these as an fsspec URL,
or a dataset of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from stream_engine.errors import ConfigError
from stream_engine.inputs.compression import CODECS
from stream_engine.inputs.hub import fetched, parse_hub, split_of
from stream_engine.inputs.names import expanded, missing_parts
from stream_engine.inputs.tars import IMAGE_SUFFIXES as PICTURE_SUFFIXES
from stream_engine.store.locations import (
    HUB,
    canonical_source,
    folder_of,
    full_path,
    open_source,
    store_errors,
)

Format = Literal["parquet", "jsonl", "json", "csv", "tsv", "arrow", "tar"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".tar": "tar",
    **dict.fromkeys((".tgz", ".tbz2", ".txz", ".tzst"), "tar"),
}
STREAMED: frozenset[Format] = frozenset(("jsonl", "json", "csv", "tsv", "tar"))
"""Formats that may be compressed besides: their suffix and one of compression.CODECS."""

RUNS = "folders of runs"
RUN_PARTS = ("shards", "leases", "logs")
"""Folders of which a run has one beside its run.json."""

SIDE_FILES = frozenset(
    (
        *("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"),
        *("manifest.jsonl", "stats.json"),
    )
)
"""What lies beside data and describes it."""
MANIFEST_PART = re.compile(r"manifest-\d+\.jsonl")
QUIET_SUFFIXES = frozenset((".md", ".txt", ".lock", ".crc", ".yaml", ".yml", ".gitattributes"))
"""Of notes that people keep beside data: not told as unread."""


PIPES = "pipes and devices"
KNOWN_SUFFIXES = f"{', '.join(FORMATS)}; the texts and tars also with {', '.join(CODECS)}"


class InputFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file to read. `path` is absolute, or a URL where the file is not local."""

    path: str
    format: Format
    size: int
    version: str
    """Changes with the content, as far as the file system tells: time of change, or an ETag."""


class FoundInputs(NamedTuple):
    """The files to read, sorted by path, and all others: (name, what it is)."""

    files: list[InputFile]
    others: list[tuple[str, str]]


def list_inputs(source: str) -> list[InputFile]:
    """The files of a source that are read; see `find_inputs`."""
    return find_inputs(source).files


def find_inputs(source: str) -> FoundInputs:
    """The files of a source.

    A folder is searched recursively for the known suffixes, linked folders too; names that start
    with "." or "_" are skipped. Of a saved `datasets` folder only the files that its state.json
    lists are data. Pictures beside jsonl files are what rows name.

    Raises:
        ConfigError: when nothing is there, the format is unknown or the URL cannot be opened.
    """
    if canonical_source(source).startswith(HUB):
        return find_on_hub(canonical_source(source))
    fs, path = open_source(source)
    try:
        infos = find_all(fs, path, source)
        is_folder = fs.isdir(path)
    except store_errors() as error:
        raise ConfigError(f"cannot read dataset_path {source!r}: {error}") from error
    is_single = len(infos) == 1 and infos[0]["name"].rstrip("/") == path.rstrip("/")
    files: list[InputFile] = []
    others: list[tuple[str, str]] = []
    for info in infos:
        check_name(info["name"])
        format = file_format(info["name"])
        if isinstance(fs, LocalFileSystem) and (what := no_file(info["name"])):
            others.append((info["name"], what))
        elif format is None:
            others.append((full_path(fs, info["name"]), kind_of(info["name"])))
        else:
            files.append(
                InputFile(
                    path=full_path(fs, info["name"]),
                    format=format,
                    size=int(info.get("size") or 0),
                    version=file_version(info),
                )
            )
    if not files and is_single and PIPES in dict(others).values():
        raise ConfigError(f"dataset_path {source!r} is a pipe or device: write it to a file first")
    if not files and is_single:
        raise ConfigError(
            f"dataset_path {source!r}: cannot tell the format; known suffixes are {KNOWN_SUFFIXES}"
        )
    try:
        files = without_side_files(fs, sorted(files, key=lambda file: file.path), is_single)
    except store_errors() as error:
        raise ConfigError(f"cannot read dataset_path {source!r}: {error}") from error
    if not files:
        raise ConfigError(
            f"dataset_path {source!r} holds no file with a known suffix ({KNOWN_SUFFIXES})"
            + (
                f"; {RUNS} are not read: name one, or its dataset/"
                if RUNS in dict(others).values()
                else ""
            )
        )
    if is_folder:
        parts = missing_parts(file.path for file in files)
        others += [(name, "missing parts (by the names of those that are there)") for name in parts]
    return FoundInputs(files, [(name, what) for name, what in sorted(others) if what])


def no_file(path: str) -> str | None:
    """What else than a file a path of this machine leads to."""
    try:
        mode = os.stat(path).st_mode
        return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else PIPES
    except FileNotFoundError:
        return "broken links"
    except OSError:  # what is wrong with it is told when it is opened
        return None


def find_all(fs: AbstractFileSystem, path: str, source: str) -> list[dict[str, Any]]:
    """The infos of all files that a path, or each that its braces stand for, names.

    Raises:
        ConfigError: for a path where there is nothing.
    """
    names = [path] if fs.exists(path) else expanded(path)
    infos: dict[str, dict[str, Any]] = {}
    for name in names:
        found = find_files(fs, name)
        if not found:
            of_name = f", of which {name}" if len(names) > 1 else ""
            hidden = " (names that begin with . or _ are not read)"
            what = f"is an empty folder{hidden}" if fs.exists(name) else "does not exist"
            raise ConfigError(f"dataset_path {source!r}{of_name} {what}")
        infos |= {info["name"]: info for info in found}
    return list(infos.values())


def find_on_hub(url: str) -> FoundInputs:
    """The files of a dataset of the hub, of the split that is asked for.

    A snapshot's path holds its commit, which tells its version.
    """
    root, split = fetched(url), parse_hub(url).split
    found = find_inputs(str(root))
    names = [os.path.relpath(file.path, root) for file in found.files]
    files = [
        msgspec.structs.replace(file, version="")
        for file, name in zip(found.files, names)
        if not split or split_of(name) == split
    ]
    if not files:
        there = ", ".join(sorted(set(map(split_of, names))))
        raise ConfigError(f"dataset_path {url!r} has no split {split!r}; there is {there}")
    return FoundInputs(files, found.others)


def kind_of(name: str) -> str:
    """What a file that is no input is, for people; empty for one that nobody misses."""
    if name.endswith("/"):
        return RUNS
    suffix = os.path.splitext(name)[1].lower()
    if suffix in QUIET_SUFFIXES or suffix[1:] in PICTURE_SUFFIXES:
        return ""
    return f"{suffix} files" if suffix else "files without a suffix"


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
        found = files_below(fs, match, fixed) if info["type"] == "directory" else [info]
        infos.update((info["name"], info) for info in found)
    return list(infos.values())


def files_below(
    fs: AbstractFileSystem, folder: str, named: str | None = None
) -> list[dict[str, Any]]:
    """The infos of all files below a folder, hidden ones left out; of each run but the one that is
    `named`, which is the folder itself, the name of its folder alone."""
    named = folder if named is None else named
    if isinstance(fs, LocalFileSystem):
        names = sorted(name for name in local_files(folder) if not is_hidden(name, folder))
        names = without_runs(names, named)
        return [fs.info(name) if os.path.isfile(name) else {"name": name} for name in names]
    found = fs.find(folder, detail=True)
    names = [name for name in found if not is_hidden(name, folder)]
    return [found.get(name, {"name": name}) for name in without_runs(names, named)]


def without_runs(names: list[str], named: str) -> list[str]:
    """Names of files, with the folder of a run, which ends in "/", in place of all files of it.

    A run whose folder lies within its own input would read what it writes.
    """
    folders = {folder_of(name) for name in names}
    runs = {
        f"{folder}/"
        for folder in folders
        if folder != named.rstrip("/") and any(f"{folder}/{part}" in folders for part in RUN_PARTS)
    }
    runs &= {name.removesuffix("run.json") for name in names}
    kept = [name for name in names if not name.startswith(tuple(runs))] if runs else names
    return [*kept, *sorted(runs)]


def local_files(folder: str) -> Iterator[str]:
    """All files below a folder on disk; linked folders are followed, but not in a circle."""
    above: dict[str, frozenset[str]] = {folder: frozenset((os.path.realpath(folder),))}
    for here, folders, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(here, name) for name in names)
        for name in list(folders):
            path = os.path.join(here, name)
            real = os.path.realpath(path)
            if real in above[here]:
                folders.remove(name)
            else:
                above[path] = above[here] | {real}
        del above[here]


def is_hidden(name: str, folder: str) -> bool:
    """Whether a name below a folder, or one between the two, starts with "." or "_"."""
    parts = name[len(folder.rstrip("/")) :].split("/")
    return any(part.startswith((".", "_")) for part in parts)


def without_side_files(
    fs: AbstractFileSystem, files: list[InputFile], is_single: bool
) -> list[InputFile]:
    """Leave out what lies beside data but is none.

    These are caches in a saved `datasets` folder, and the manifest beside a run's own shards.
    """
    if is_single:
        return files
    arrow_folders = {folder_of(file.path) for file in files if file.format == "arrow"}
    listed = {folder: state_files(fs, folder) for folder in arrow_folders}
    kept = []
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if file.format == "arrow":
            names = listed[folder]
            if name.startswith("cache-") if names is None else name not in names:
                continue
        if (name in SIDE_FILES or MANIFEST_PART.fullmatch(name)) and len(files) > 1:
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
        names = {entry["filename"] for entry in state["_data_files"]}
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{state_path} is not a saved dataset's state: {error}") from error
    for name in sorted(names):
        if not fs.exists(f"{folder}/{name}"):
            raise ConfigError(f"{state_path} names {name}, which is not there; copy it too")
    return names


def check_name(name: str) -> None:
    """Refuse names that no report could print."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the file name {name!r} is not UTF-8; rename the file") from error


def file_format(name: str) -> Format | None:
    """The format that a file's suffix says, or None."""
    name = name.lower()
    codec = next((end for end in CODECS if name.endswith(end)), "")
    bare = name.removesuffix(codec)
    for suffix, format in FORMATS.items():
        if bare.endswith(suffix) and (not codec or format in STREAMED):
            return format
    return None


def file_version(info: dict[str, Any]) -> str:
    """The time of change or tag that a file system gives for a file."""
    for name in ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created"):
        if info.get(name) is not None:
            return str(info[name])
    return ""
