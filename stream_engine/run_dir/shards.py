"""Shards: WebDataset tars of samples, byte-reproducible, verified when they are read.

A sample is `{key}.json` (every field but the images' bytes) and `{key}.{i}.{ext}`, one member per
image with its original encoded bytes. Owner, mode and times are fixed, so equal samples make equal
tars. A tar that was cut at a member's boundary reads silently short in WebDataset: readers here
compare size, checksum, keys and count with the manifest's ShardInfo.

webdataset imports torch, so it is imported where a tar is not one of ours any more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from tarfile import TarError
from typing import Any, BinaryIO

import msgspec

from stream_engine.errors import ShardReadError
from stream_engine.records import (
    EncodedImage,
    GivenAnswer,
    Sample,
    ShardInfo,
    carried_hash,
    sample_key,
)
from stream_engine.run_dir.plain_tar import PlainTarWriter, UnusualTar, plain_samples
from stream_engine.store import files
from stream_engine.store.base import Location, Version

CHUNK_BYTES = 1 << 20


class StoredSample(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON member of a sample: `Sample` with the images' paths in place of the images."""

    key: str
    idx: str
    question: str
    image_paths: list[str] = []
    ds_name: str = ""
    origin_dataset: str = ""
    origin_split: str = ""
    image_path: str = ""
    metainfos: str = ""


class StoredWithAnswers(StoredSample, frozen=True, kw_only=True):
    """The same of a sample that brings answers."""

    answers: tuple[GivenAnswer, ...] = ()


def write_shard(
    path: Location, index: int, samples: Iterable[Sample], *, over: Version | None = None
) -> ShardInfo:
    """Write one shard, one sample at a time; returns its line for the manifest.

    Args:
        over: the version of a tar that no manifest lists, which this one replaces.

    Raises:
        ChangedError: when another process has put a tar there.
    """
    keys: list[str] = []
    ids: list[str] = []
    carried: list[str] = []
    images: Counter[int] = Counter()
    with files.spool(path.parent) as new:
        hashing = HashingWriter(new.file)
        tar = PlainTarWriter(hashing)
        for sample in samples:
            tar.write(sample.key, sample_members(sample))
            keys.append(sample.key)
            ids.append(sample.idx)
            carried.append(carried_hash(sample))
            images[len(sample.images)] += 1
        tar.close()
        assert len(set(keys)) == len(keys), f"a key occurs twice in shard {index}"
        new.publish(path, over)
    return ShardInfo(
        index=index,
        num_samples=len(keys),
        num_bytes=hashing.num_bytes,
        sha256=hashing.hexdigest(),
        keys=keys,
        ids=ids,
        images=dict(sorted(images.items())),
        carried=carried if any(carried) else [],
    )


def read_shard(path: Location, info: ShardInfo, *, verify: bool = True) -> Iterator[Sample]:
    """Yield the samples of a shard in order, one at a time.

    `verify` compares size and checksum before the first sample is yielded; number and order of
    the keys are compared always.

    Raises:
        ShardReadError: when the tar is missing, torn or is not what `info` says; it names the
            tar, and the first bad member where one can be told.
    """
    with opened(path) as file:
        if verify:
            problem = checksum_problem(file, info)
            file.seek(0)
            if problem:
                raise first_damage(path, file, info) or ShardReadError(path, problem)
        yield from checked_samples(path, file, info)


@contextmanager
def opened(path: Location) -> Iterator[BinaryIO]:
    """An open tar; what fails it is a ShardReadError."""
    try:
        with files.open_file(path) as file:
            yield file
    except OSError as error:
        raise ShardReadError(path, error.strerror or str(error)) from error


def checked_samples(path: Location, file: BinaryIO, info: ShardInfo) -> Iterator[Sample]:
    """The samples in a tar, after comparing their keys with the manifest's."""
    num_read = 0
    for members in tar_samples(path, file):
        key = members["__key__"]
        if num_read >= len(info.keys) or key != info.keys[num_read]:
            raise ShardReadError(path, "unexpected sample", f"{key}.json")
        yield parse_members(path, key, members)
        num_read += 1
    if num_read != info.num_samples:
        raise ShardReadError(
            path,
            f"{num_read} samples, the manifest says {info.num_samples}; "
            f"the first missing one is {info.keys[num_read]}",
        )


def tar_samples(path: Location, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """WebDataset samples (`__key__` and suffix -> bytes) of one tar, streaming.

    Raises:
        ShardReadError: for whatever goes wrong with the tar, naming the member it happened in.
    """
    num_read = 0
    try:
        for sample in plain_samples(file):
            yield sample
            num_read += 1
    except UnusualTar:
        file.seek(0)
        yield from islice(general_samples(path, file), num_read, None)


def general_samples(path: Location, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The same of any tar, as webdataset reads it."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    member = ""

    def notice(name: str) -> bool:
        nonlocal member
        member = name
        return True

    def members(file: BinaryIO) -> Iterator[dict[str, Any]]:
        for content in tar_file_iterator(file, select_files=notice):
            yield {**content, "__url__": str(path)}

    try:
        yield from group_by_keys(members(file))
    except (TarError, OSError, EOFError, ValueError) as error:
        detail = str(error.args[0]) if error.args else type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            detail = error.strerror
        raise ShardReadError(path, detail.partition(" @ ")[0], member) from error


def sample_members(sample: Sample) -> dict[str, bytes]:
    """The files of a sample, by what follows its key in their names."""
    kind = StoredWithAnswers if sample.answers else StoredSample
    stored = kind(
        image_paths=[image.path for image in sample.images],
        **{name: getattr(sample, name) for name in kind.__struct_fields__ if name != "image_paths"},
    )
    members = {"json": msgspec.json.encode(stored)}
    for i, image in enumerate(sample.images):
        members[f"{i}.{image_extension(image.data)}"] = image.data
    return members


def parse_members(path: Location, key: str, members: dict[str, Any]) -> Sample:
    """A sample from its members, the inverse of `sample_members`."""
    if "json" not in members:
        raise ShardReadError(path, "member is missing", f"{key}.json")
    try:
        stored = msgspec.json.decode(members["json"], type=StoredWithAnswers)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardReadError(path, str(error), f"{key}.json") from error
    data_at = {
        int(suffix.split(".")[0]): data
        for suffix, data in members.items()
        if suffix.split(".")[0].isdecimal()
    }
    images = []
    for i, image_path in enumerate(stored.image_paths):
        if i not in data_at:
            raise ShardReadError(path, "member is missing", f"{key}.{i}.*")
        images.append(EncodedImage(data_at[i], image_path))
    fields = msgspec.structs.asdict(stored)
    del fields["image_paths"]
    return Sample(images=tuple(images), **fields)


def checksum_problem(file: BinaryIO, info: ShardInfo) -> str:
    """What is wrong with the tar's bytes, or an empty string."""
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += len(chunk)
    if num_bytes != info.num_bytes:
        return f"{num_bytes} bytes, the manifest says {info.num_bytes}"
    if digest.hexdigest() != info.sha256:
        return "its checksum is not the manifest's"
    return ""


def first_damage(path: Location, file: BinaryIO, info: ShardInfo) -> ShardReadError | None:
    """The error that names the first damaged member, if the samples themselves tell.

    A key is a hash of its sample's content, so a changed image shows in its own key.
    """
    try:
        for sample in checked_samples(path, file, info):
            own_idx = "" if sample.idx == sample.key else sample.idx
            key = sample_key(own_idx, sample.question, sample.images, sample.answers)
            if key != sample.key:
                return ShardReadError(path, "content does not match its key", f"{sample.key}.*")
    except ShardReadError as error:
        return error
    return None


def image_extension(data: bytes) -> str:
    """The usual file extension of an encoded image, told from its first bytes."""
    for magic, extension in IMAGE_MAGIC.items():
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return UNKNOWN_EXTENSION


UNKNOWN_EXTENSION = "img"
IMAGE_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
    b"\x00\x00\x00\x0cjP  ": "jp2",
}


class HashingWriter:
    """A binary file that counts and hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()
