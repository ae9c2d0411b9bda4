"""Object storage: `s3://`, `gs://`, `az://`, by conditional puts.

The package obstore (Rust's object_store) does the requests: it has conditional puts, ranged reads
and multipart uploads for all three, and reads credentials and endpoints as the AWS, Google and
Azure tools do. A version is an object's ETag.

A request whose answer was lost is sent again, and its condition then fails on its own effect. So
every object bears a random mark of who wrote it (user metadata), and a failed condition is believed
only when the mark is another's.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
import time
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from stream_engine.errors import ChangedError, ConfigError
from stream_engine.store.base import (
    Entry,
    Location,
    ObjectPath,
    Spool,
    Version,
    Wanted,
    absent,
    all_names,
)
from stream_engine.store.requests import (
    FIRST_RETRIES,
    RETRIES,
    ConditionError,
    ask,
    content,
    in_whole,
    no_bucket,
    reach,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

SCHEMES = ("s3://", "gs://", "gcs://", "az://", "abfs://", "abfss://", "azure://")
IN_MEMORY_BYTES = 8 << 20
"""What a spool holds before it goes to a temporary file of this machine."""
READ_BYTES = 4 << 20
CLOCK_S = 60.0
"""For how long the store's clock is told from this machine's monotonic one."""
TIMEOUT_S = "30s"
MARK = "written-by"
DEFAULT_REGION = "us-east-1"


def is_object_url(path: str) -> bool:
    """Whether a path names an object store that can be written to."""
    return path.startswith(SCHEMES)


def object_path(url: str) -> ObjectPath:
    """A URL taken apart.

    Raises:
        ConfigError: when it names no bucket.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{url!r} names no bucket; write {scheme}://bucket/folder")
    parts = [part for part in key.split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise ConfigError(f"{url!r}: a name in an object store has no '.' or '..'")
    return ObjectPath(f"{scheme}://{bucket}", "/".join(parts))


class ObjectStore:
    """The objects of one bucket."""

    def __init__(self, root: str) -> None:
        """`root` is scheme and bucket.

        Raises:
            ConfigError: when the package is missing, or the store cannot be set up.
        """
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise ConfigError(f"{root} needs the package obstore: pip install obstore") from error
        self.root = root
        client: Any = {"timeout": TIMEOUT_S, "allow_http": True}  # where the address says http://
        try:
            found = {"client_options": client, **settings(root)}
            self._bucket: Bucket = from_url(root, retry_config=RETRIES, **found)
            self._first: Bucket = from_url(root, retry_config=FIRST_RETRIES, **found)
        except Exception as error:
            raise ConfigError(f"cannot open {root}: {error}") from error
        self.is_reached = False
        self._clock: tuple[float, float] | None = None

    @property
    def bucket(self) -> Bucket:
        """Where requests go, once anybody has answered there at all.

        Raises:
            OSError: when nobody does.
        """
        if not self.is_reached:
            reach(self.root, self._first)
            self.is_reached = True
        return self._bucket

    def read(self, path: Location) -> tuple[bytes, Entry] | None:
        try:
            found, data = content(path, self.bucket, key_of(path))
        except FileNotFoundError:
            return None
        return (bytes(data), entry_of(path.parent, path.name, found.meta)) if data else None

    def stat(self, path: Location) -> Entry | None:
        import obstore

        try:
            entry = entry_of(
                path.parent, path.name, ask(path, obstore.head, self.bucket, key_of(path))
            )
        except FileNotFoundError:
            return None
        return entry if entry.size else None

    def list_files(self, folder: Location, wanted: Wanted = all_names) -> list[Entry]:
        prefix = key_of(folder)
        return [
            entry_of(folder, name, meta)
            for meta in self.below(prefix)["objects"]
            if meta["size"]
            and not (name := meta["path"].rpartition("/")[2]).startswith(".")
            and wanted(name)
        ]

    def list_folders(self, folder: Location) -> list[Location]:
        names = [p.rstrip("/").rpartition("/")[2] for p in self.below(key_of(folder))["prefixes"]]
        return [folder / name for name in names if not name.startswith(".")]

    def below(self, prefix: str) -> dict[str, list[Any]]:
        """Objects and common prefixes right below a prefix, by name."""
        import obstore

        address, bucket = f"{self.root}/{prefix}", self.bucket
        found = in_whole(lambda: ask(address, obstore.list_with_delimiter, bucket, prefix or None))
        return {
            "objects": sorted(found["objects"], key=lambda meta: meta["path"]),
            "prefixes": sorted(found["common_prefixes"]),
        }

    def read_ends(self, file: Location | Entry, head: int, tail: int) -> tuple[bytes, bytes, int]:
        path = file.path if isinstance(file, Entry) else file
        first, meta = self.part(path, (0, head))
        size = meta["size"]
        last = first if size <= head else self.part(path, (size - min(tail, size), size))[0]
        return first, last[-tail:], size

    def part(self, path: Location, span: tuple[int, int]) -> tuple[bytes, Any]:
        """Some bytes of an object, and what it is. Raises FileNotFoundError."""
        try:
            found, data = content(path, self.bucket, key_of(path), options={"range": span})
            return bytes(data), found.meta
        except OSError as error:  # of an empty object, which counts as absent, no range can be had
            if isinstance(error, FileNotFoundError) or self.stat(path) is None:
                raise absent(path) from error
            raise

    def open(self, path: Location) -> BinaryIO:
        """One request for a small object, which is then in memory."""
        first, meta = self.part(path, (0, READ_BYTES))
        if meta["size"] <= len(first):
            return io.BytesIO(first)
        reader = RangedReader(self.bucket, entry_of(path.parent, path.name, meta), first)
        return cast(BinaryIO, io.BufferedReader(reader, READ_BYTES))

    def spool(self, folder: Location) -> Spool:
        return ObjectSpool(self)

    def take(self, source: Path, path: Location) -> None:
        in_whole(lambda: self.upload(source, path))
        source.unlink()

    def upload(self, source: Path, path: Location) -> None:
        """Write a file of this machine to an object, whatever is there.

        A large one goes in several requests. The last of them, sent again since its answer was
        lost, finds no upload any more: what came of it is told by the mark.
        """
        import obstore

        mark = uuid.uuid4().hex
        try:
            ask(path, obstore.put, self.bucket, key_of(path), source, attributes={MARK: mark})
        except OSError:
            if self.marked(path)[1] != mark:
                raise

    def erase(self, path: Location) -> None:
        import obstore

        ask(path, obstore.delete, self.bucket, key_of(path))

    def now(self, folder: Location) -> float:
        """Asked of the store once a minute.

        A slow answer makes it late, never early: a lease that is beating would look stale.
        """
        import obstore

        if self._clock is None or time.monotonic() - self._clock[1] > CLOCK_S:
            probe = folder / f".clock-{uuid.uuid4().hex[:12]}"
            ask(probe, obstore.put, self.bucket, key_of(probe), b"now")
            ticks = time.monotonic()
            asked = ask(probe, obstore.head, self.bucket, key_of(probe))["last_modified"]
            ask(probe, obstore.delete, self.bucket, key_of(probe))
            self._clock = asked.timestamp(), ticks
        return self._clock[0] + time.monotonic() - self._clock[1]

    def put(self, path: Location, file: BinaryIO, size: int, version: Version | None) -> Version:
        """Write an object where it is that version, or (None) absent; returns its new version.

        Raises:
            ChangedError: when it is not.
        """
        import obstore

        mode: Any = "create" if version is None else {"e_tag": version}
        body, mark = file if size else b"", uuid.uuid4().hex
        try:
            # A condition needs a single request: multipart uploads have none.
            written = ask(
                *(path, obstore.put, self.bucket, key_of(path), body),
                mode=mode,
                use_multipart=False,
                attributes={MARK: mark},
            )
            return cast(str, written["e_tag"])
        except (ConditionError, FileNotFoundError) as error:
            if version is None and isinstance(error, FileNotFoundError):
                raise no_bucket(self.root) from error
            there, its_mark = self.marked(path)
            if there is not None and its_mark == mark:
                return there.version
            if there is not None and version is None and not there.size:
                return self.put(path, rewound(file), size, there.version)
            raise ChangedError(path) from error

    def marked(self, path: Location) -> tuple[Entry | None, str]:
        """An object as it is, removed ones included, and the mark of who wrote it."""
        import obstore

        try:
            found = ask(path, obstore.get, self.bucket, key_of(path))
            return entry_of(path.parent, path.name, found.meta), str(found.attributes.get(MARK, ""))
        except FileNotFoundError:
            return None, ""


class RangedReader(io.RawIOBase):
    """An object's bytes at any place, by ranged requests of as much as its buffer asks for."""

    def __init__(self, bucket: Bucket, entry: Entry, first: bytes = b"") -> None:
        """`first` are bytes of its beginning that are here already."""
        self.bucket = bucket
        self.entry = entry
        self.first = first
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.entry.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readall(self) -> bytes:
        found = bytearray(max(0, self.entry.size - self.position))
        start = 0
        while start < len(found):
            start += self.readinto(memoryview(found)[start : start + READ_BYTES])
        return bytes(found)

    def readinto(self, buffer: Any) -> int:
        """Raises OSError (ESTALE) when the object was replaced since it was opened."""
        length = min(len(buffer), self.entry.size - self.position)
        if length <= 0:
            return 0
        if self.position < len(self.first):
            known = self.first[self.position : self.position + length]
            buffer[: len(known)] = known
            self.position += len(known)
            return len(known)
        path = self.entry.path
        span = (self.position, self.position + length)
        found, data = content(path, self.bucket, key_of(path), options={"range": span})
        if found.meta["e_tag"] != self.entry.version:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        buffer[: len(data)] = memoryview(data)
        self.position += len(data)
        return len(data)


class ObjectSpool(Spool):
    """An object in the making: in memory, and beyond 8 MiB in a temporary file of this machine."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.file = cast(BinaryIO, tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES))  # noqa: SIM115

    def publish(
        self, path: Location, version: Version | None = None, *, durable: bool = True
    ) -> Version:
        size = self.file.seek(0, os.SEEK_END)
        return self.store.put(path, rewound(self.file), size, version)

    def drop(self) -> None:
        self.file.close()


def rewound(file: BinaryIO) -> BinaryIO:
    """The file at its beginning."""
    file.seek(0)
    return file


def key_of(path: Location) -> str:
    assert isinstance(path, ObjectPath), path
    return path.key


def entry_of(folder: Location, name: str, meta: Any) -> Entry:
    modified = meta["last_modified"].timestamp()
    return Entry(folder, name, meta["e_tag"] or "", meta["size"], modified)


def settings(root: str) -> dict[str, Any]:
    """What S3 needs beside what obstore reads of the environment itself.

    Region, address and credentials are those that the AWS tools would use, profiles included, where
    boto3 is installed.
    """
    if not root.startswith("s3://"):
        return {}
    found: dict[str, Any] = {"conditional_put": "etag"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return found | {"region": region or DEFAULT_REGION}
    session = Session()
    found["region"] = region = region or session.region_name or DEFAULT_REGION
    address = session.client("s3", region_name=region).meta.endpoint_url
    if "amazonaws.com" not in address:
        found["endpoint"] = address
    if session.get_credentials() is not None:
        found["credential_provider"] = Boto3CredentialProvider(session)
    return found


@cache
def object_store(root: str) -> ObjectStore:
    """The store of a bucket, opened once a process."""
    return ObjectStore(root)
