"""Which samples a run already holds, in a temporary database, so that memory stays flat.

The manifest is the truth; the database is rebuilt from it and thrown away.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable
from itertools import repeat
from typing import Any, Literal

from stream_engine.errors import ConfigError
from stream_engine.records import ShardInfo
from stream_engine.run_dir.manifest import ShardLine
from stream_engine.text import describe

CACHE_KIB = 32_768


class Database(sqlite3.Connection):
    """Says what a person can do when its file cannot be written."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            raise ConfigError(unwritable(error)) from error

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().executemany(*arguments)
        except sqlite3.OperationalError as error:
            raise ConfigError(unwritable(error)) from error


class KnownSamples:
    """Maps each id to the keys of its samples. A context manager; closing deletes the file.

    An id stands for one sample within a source; two sources may both count from 0. Samples that
    bring answers may share one: other answers to a question are another sample.
    """

    def __init__(self, shards: Iterable[ShardLine] = ()) -> None:
        """Take up the samples of existing shards.

        Raises:
            ConfigError: when the temporary folder cannot be written, now or later.
        """
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="stream-engine-")
        except OSError as error:
            raise ConfigError(unwritable(error)) from error
        path = f"{self._folder.name}/known.sqlite"
        self._database = sqlite3.connect(path, isolation_level=None, factory=Database)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute(
            "CREATE TABLE known "
            "(id BLOB, key BLOB, source BLOB, pending INT, reading INT, carried TEXT)"
        )
        self.reading = 0
        self._database.execute("BEGIN")
        for line in shards:
            self._database.executemany(
                "INSERT INTO known VALUES (?, ?, ?, 0, 0, ?)",
                [
                    (hashed(idx), bytes.fromhex(key), hashed(line.source), carried)
                    for idx, key, carried in samples_of(line.shard)
                ],
            )
        # Sorted in one go, which takes half the time of keeping it sorted.
        self._database.execute("CREATE INDEX by_id ON known (id)")

    def __enter__(self) -> KnownSamples:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._database.close()
        self._folder.cleanup()

    def begin_reading(self) -> None:
        """From now on another input, or the same one again, is read."""
        self.reading += 1

    def touch(self, idx: str, source: str) -> None:
        """Note that the input being read has a row of that id, whatever became of it."""
        self._database.execute(
            "UPDATE known SET reading = ? WHERE id = ? AND source = ?",
            (self.reading, hashed(idx), hashed(source)),
        )

    def num_gone(self, source: str) -> int:
        """Samples of a source that it held once and that this reading did not meet."""
        found = self._database.execute(
            "SELECT count(*) FROM known WHERE source = ? AND reading < ?",
            (hashed(source), self.reading),
        )
        return found.fetchone()[0]

    def set_pending(self, shards: Iterable[ShardInfo]) -> None:
        """Mark samples that the input now being read has added before it was interrupted."""
        for shard in shards:
            self._database.executemany(
                "UPDATE known SET pending = 1 WHERE id = ? AND key = ?",
                [(hashed(idx), bytes.fromhex(key)) for idx, key in zip(shard.ids, shard.keys)],
            )

    def clear_pending(self) -> None:
        """Forget all marks."""
        self._database.execute("UPDATE known SET pending = 0 WHERE pending = 1")

    def classify(
        self, idx: str, key: str, source: str, *, carried: str = "", is_shared: bool = False
    ) -> Literal["new", "pending", "known", "known_otherwise", "changed", "conflict"]:
        """What a sample of a source is to the run; a new one is known from now on.

        "pending" is said once: the interrupted read added this very sample. One that is "known
        otherwise" is known, but `carried`, the hash of what it carries, is another. Of a "changed"
        one an earlier reading had another content, of a "conflict" this reading. An id that
        `is_shared` may stand for several samples, none of which is either.
        """
        found = (hashed(idx), bytes.fromhex(key), hashed(source))
        rows: list[tuple[bytes, bytes, int, int, str | None]] = self._database.execute(
            "SELECT key, source, pending, reading, carried FROM known WHERE id = ?", found[:1]
        ).fetchall()
        own_keys = [row[0] for row in rows if row[1] == found[2]]
        is_repeated = any(row[1] == found[2] and row[3] == self.reading for row in rows)
        if own_keys and not (is_repeated or is_shared):
            self.touch(idx, source)
        is_other = found[1] not in own_keys
        if own_keys and is_other and not is_shared:
            return "conflict" if is_repeated else "changed"
        held = [row[4] for row in rows if row[0] == found[1]]
        if is_shared and not is_other:
            self._database.execute(
                "UPDATE known SET reading = ? WHERE id = ? AND key = ? AND source = ?",
                (self.reading, *found),
            )
        elif not own_keys or is_other:
            self._database.execute(
                "INSERT INTO known VALUES (?, ?, ?, 0, ?, ?)",
                (*found, self.reading, held[0] if held else carried),
            )
        if not held:
            return "new"
        if any(row[2] for row in rows if row[0] == found[1]):
            self._database.execute(
                "UPDATE known SET pending = 0 WHERE id = ? AND key = ?", found[:2]
            )
            return "pending"
        return "known" if held[0] in (carried, None) else "known_otherwise"


def samples_of(shard: ShardInfo) -> Iterable[tuple[str, str, str | None]]:
    """Id, key and hash of what is carried of each sample; None where the manifest tells none."""
    nothing = None if shard.carried is None else ""
    return zip(shard.ids, shard.keys, shard.carried or repeat(nothing))


def unwritable(error: Exception) -> str:
    """What to do when there is no place for temporary files."""
    return (
        f"temporary files cannot be written ({describe(error)}): set TMPDIR to a folder that can "
        "be written and has space; the same command resumes"
    )


def hashed(idx: str) -> bytes:
    """Ids are stored as 16 bytes, whatever their length."""
    return hashlib.blake2b(idx.encode(), digest_size=16).digest()
