"""failures/000012.json: why a shard failed, how often it was tried, when it may be tried again.

A worker that ended at a shard (killed for memory, crashed, device lost) is counted apart from the
attempts that raised, since nobody knows whether the shard was to blame or the machine: no number of
deaths makes a shard fail. From MAX_DEATHS_TOGETHER on its records are processed one by one, each
noted before it is begun; at MAX_DEATHS_ALONE at the same one, that record is set aside.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from typing import Any, Literal

import msgspec

from stream_engine.config import Stage, WorkerConfig
from stream_engine.errors import ShardReadError
from stream_engine.run_dir.paths import RunDir
from stream_engine.store import files
from stream_engine.store.base import Version
from stream_engine.text import describe

logger = logging.getLogger(__name__)

MAX_DEATHS_TOGETHER = 5
MAX_DEATHS_ALONE = 2
"""A record that ends its worker does so each time. That a machine is taken away five times at one
shard, which was put last after the first, and then twice at the same record, is not to be expected.
Records processed one by one are slow, and their log-probs differ in the last bits."""


class ShardFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The failed attempts at one stage of a shard, and the last error.

    Times are seconds since the epoch, by the store's clock.
    """

    shard: int
    stage: Stage
    fingerprint: str
    """Of the stage's settings: a failure under other settings counts no longer."""
    attempts: int
    error: str
    traceback: str
    source: str
    """The shard's tar or the damaged result, and the member at fault where it is known."""
    member: str = ""
    key: str = ""
    worker: str = ""
    time: float = 0.0
    retry_at: float = 0.0
    damaged: Literal["result", "tar"] | None = None
    """A finished file that was found damaged. The results of a shard whose tar is stay valid, but
    no dataset can be built from them."""
    alone: str = ""
    """The record that a worker is at, or was when it ended, where they go one by one: its key."""
    deaths: dict[str, int] = {}
    """How many workers ended at a record that they processed alone, by its key; at "" those that
    ended while the records were processed together."""
    version: Version = ""
    """Of the file that this was read from; empty when there is none. Not written."""

    def is_final(self, max_retries: int) -> bool:
        """Whether the shard is given up until someone asks for a retry."""
        return self.damaged is not None or self.attempts > max_retries

    def needs_isolation(self, max_retries: int) -> bool:
        """Whether its records are processed one by one from now on."""
        return self.attempts >= max_retries or self.deaths.get("", 0) >= MAX_DEATHS_TOGETHER

    def at_stage(self, stage: Stage, fingerprint: str) -> ShardFailure:
        """The failure of a shard whose isolation goes on at the next stage."""
        deaths = {"": self.deaths.get("", 0)}
        return msgspec.structs.replace(self, stage=stage, fingerprint=fingerprint, deaths=deaths)

    @property
    def num_deaths(self) -> int:
        """What orders shards: those that ended most workers come last."""
        return sum(self.deaths.values())


def record_failure(
    run_dir: RunDir,
    error: Exception,
    *,
    shard: int,
    stage: Stage,
    fingerprint: str,
    worker: str,
    config: WorkerConfig,
    damaged: Literal["result", "tar"] | None = None,
    remedy: str = "",
    ended_worker: bool = False,
) -> ShardFailure:
    """Write one more failed attempt at a shard, with the time of its next one (doubling).

    A finished file that is `damaged` makes the failure final at once; `remedy` says what to do.
    With `ended_worker` it is no attempt but a death, at the record that was processed alone.
    """
    before = read_failure(run_dir, shard)
    version = before.version if before is not None else files.version_of(run_dir.failure(shard))
    if before is not None and (before.stage, before.fingerprint) != (stage, fingerprint):
        before = None
    attempts = before.attempts if before is not None else 0
    deaths = Counter(before.deaths if before is not None else {})
    if ended_worker:
        deaths[before.alone if before is not None else ""] += 1
    else:
        attempts += 1
    member = error.member if isinstance(error, ShardReadError) else ""
    tar = str(run_dir.shard(shard))
    now = files.now(run_dir.leases_dir)
    failure = ShardFailure(
        shard=shard,
        stage=stage,
        fingerprint=fingerprint,
        attempts=attempts,
        error=f"{describe(error)}; {remedy}" if remedy else describe(error),
        traceback="".join(traceback.format_exception(error)),
        source=error.path if damaged and isinstance(error, ShardReadError) else tar,
        member=member,
        key=member.split(".")[0] or getattr(error, "key", ""),
        worker=worker,
        time=now,
        # Attempts are few; of deaths there may be any number, and the shard is put last anyway.
        retry_at=now
        + config.retry_backoff_s * 2 ** min(attempts + deaths.total() - 1, MAX_DEATHS_TOGETHER),
        damaged=damaged,
        deaths=dict(deaths),
        version=version or "",
    )
    return write_failure(run_dir, failure)


def note_alone(run_dir: RunDir, failure: ShardFailure, key: str) -> ShardFailure:
    """Write down which record of a failed shard is processed alone now; "" when none is."""
    return write_failure(run_dir, msgspec.structs.replace(failure, alone=key))


def write_failure(run_dir: RunDir, failure: ShardFailure) -> ShardFailure:
    """Write a failure over the one that it was read from; returns it with its new version.

    Raises:
        ChangedError: when another process has written one since.
    """
    encoded = msgspec.json.encode(msgspec.structs.replace(failure, version=""))
    content = msgspec.json.format(encoded, indent=2) + b"\n"
    version = files.replace(run_dir.failure(failure.shard), content, failure.version or None)
    return msgspec.structs.replace(failure, version=version)


def read_failure(run_dir: RunDir, shard: int) -> ShardFailure | None:
    """The failure on file for a shard; None without one, or when the file is damaged."""
    path = run_dir.failure(shard)
    found = files.read(path)
    if found is None:
        return None
    try:
        failure = msgspec.json.decode(found[0], type=ShardFailure)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s is damaged (%s); the shard's attempts count from 0", path, error)
        return None
    return msgspec.structs.replace(failure, version=found[1].version)


def clear_failure(run_dir: RunDir, shard: int) -> None:
    """Take a failure away: its shard is done, or to be tried as if for the first time.

    Raises:
        ChangedError: when another process has written one meanwhile.
    """
    path = run_dir.failure(shard)
    if (version := files.version_of(path)) is not None:
        files.remove(path, version)


def plain(failure: ShardFailure) -> dict[str, Any]:
    """A failure for people and scripts: without its traceback."""
    fields = msgspec.to_builtins(failure)
    del fields["traceback"], fields["version"]
    return fields
