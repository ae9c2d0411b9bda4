"""Which samples a run already holds, in a temporary database, so that memory stays flat.

The manifest is the truth; the database is rebuilt from it and thrown away.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from typing import Literal

from stream_engine.records import ShardInfo

CACHE_KIB = 32_768


class KnownSamples:
    """Maps each id to the key of its sample. A context manager; closing deletes the file."""

    def __init__(self, shards: Iterable[ShardInfo] = ()) -> None:
        """Take up the samples of existing shards."""
        self._folder = tempfile.TemporaryDirectory(prefix="stream-engine-")
        self._database = sqlite3.connect(f"{self._folder.name}/known.sqlite", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE known (id BLOB, key BLOB, pending INT)")
        self._database.execute("BEGIN")
        for shard in shards:
            self._database.executemany(
                "INSERT INTO known VALUES (?, ?, 0)",
                [(hashed(idx), bytes.fromhex(key)) for idx, key in zip(shard.ids, shard.keys)],
            )
        # Sorted in one go, which takes half the time of keeping it sorted.
        self._database.execute("CREATE INDEX by_id ON known (id)")

    def __enter__(self) -> KnownSamples:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._database.close()
        self._folder.cleanup()

    def set_pending(self, shards: Iterable[ShardInfo]) -> None:
        """Mark samples that the input now being read has added before it was interrupted."""
        for shard in shards:
            self._database.executemany(
                "UPDATE known SET pending = 1 WHERE id = ?", [(hashed(idx),) for idx in shard.ids]
            )

    def clear_pending(self) -> None:
        """Forget all marks."""
        self._database.execute("UPDATE known SET pending = 0 WHERE pending = 1")

    def classify(self, idx: str, key: str) -> Literal["new", "pending", "known", "conflict"]:
        """What a sample is to the run; a new one is known from now on.

        "pending" is said once: the interrupted read added this very sample.
        """
        id_hash, key_bytes = hashed(idx), bytes.fromhex(key)
        row: Sequence | None = self._database.execute(
            "SELECT key, pending FROM known WHERE id = ?", (id_hash,)
        ).fetchone()
        if row is None:
            self._database.execute("INSERT INTO known VALUES (?, ?, 0)", (id_hash, key_bytes))
            return "new"
        if row[0] != key_bytes:
            return "conflict"
        if row[1]:
            self._database.execute("UPDATE known SET pending = 0 WHERE id = ?", (id_hash,))
            return "pending"
        return "known"


def hashed(idx: str) -> bytes:
    """Ids are stored as 16 bytes, whatever their length."""
    return hashlib.blake2b(idx.encode(), digest_size=16).digest()
