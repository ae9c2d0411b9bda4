"""failures/000012.json: why a shard failed, how often it was tried, when it may be tried again."""

from __future__ import annotations

import logging
import time
import traceback
from typing import Any, Literal

import msgspec

from stream_engine.config import Stage, WorkerConfig
from stream_engine.errors import ShardReadError
from stream_engine.storage.atomic import write_atomic
from stream_engine.storage.run_dir import RunDir

logger = logging.getLogger(__name__)


class ShardFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The failed attempts at one stage of a shard, and the last error. Times are epoch seconds."""

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

    def is_final(self, max_retries: int) -> bool:
        """Whether the shard is given up until someone asks for a retry."""
        return self.damaged is not None or self.attempts > max_retries


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
) -> ShardFailure:
    """Write one more failed attempt at a shard, with the time of its next one (doubling).

    A finished file that is `damaged` makes the failure final at once; `remedy` says what to do.
    """
    before = read_failure(run_dir, shard)
    counts = before is not None and (before.stage, before.fingerprint) == (stage, fingerprint)
    attempts = before.attempts + 1 if before is not None and counts else 1
    member = error.member if isinstance(error, ShardReadError) else ""
    tar = str(run_dir.shard(shard))
    now = time.time()
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
        retry_at=now + config.retry_backoff_s * 2 ** (attempts - 1),
        damaged=damaged,
    )
    encoded = msgspec.json.format(msgspec.json.encode(failure), indent=2)
    write_atomic(run_dir.failure(shard), encoded + b"\n")
    return failure


def read_failure(run_dir: RunDir, shard: int) -> ShardFailure | None:
    """The failure on file for a shard; None without one, or when the file is damaged."""
    path = run_dir.failure(shard)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ShardFailure)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s is damaged (%s); the shard's attempts count from 0", path, error)
        return None


def clear_failure(run_dir: RunDir, shard: int) -> None:
    run_dir.failure(shard).unlink(missing_ok=True)


def describe(error: BaseException) -> str:
    """An error in one line, with its type where the message alone would not tell."""
    text = " ".join(str(error).split())
    known = type(error).__module__.startswith("stream_engine")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def plain(failure: ShardFailure) -> dict[str, Any]:
    """A failure for people and scripts: without its traceback."""
    fields = msgspec.to_builtins(failure)
    del fields["traceback"]
    return fields
