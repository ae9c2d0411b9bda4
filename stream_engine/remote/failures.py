"""What goes wrong with a request, and whose fault it is.

ConfigError     the key, the URL, the model's name or a setting: nothing is tried again
RecordError     this record: it is set aside by the reason, and the others go on
PassingError    may pass: the request is tried again
ServerError     the server is down, or lets nobody in: its shard is tried again later
"""

from __future__ import annotations

import email.utils
import time

from stream_engine.errors import ConfigError, RecordError, ServerError, StreamEngineError

LONGEST_WAIT_S = 600.0
"""A server that asks for more (Retry-After) is asked again after this."""
PASSING = frozenset((408, 409, 425, 429))
"""Beside all from 500."""
TOO_LONG = ("context length", "context_length", "maximum context", "too long", "max_model_len")
RECORDS_OWN = frozenset((400, 413, 415, 422))


class PassingError(StreamEngineError):
    """A request failed as it may not fail the next time."""

    def __init__(
        self, reason: str, detail: str, *, retry_after_s: float = 0.0, is_servers: bool = False
    ) -> None:
        """`is_servers`: no record brings it about (no connection, too many requests)."""
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.is_servers = is_servers


def failure_of(
    status: int, detail: str, *, where: str, retry_after: str | None
) -> ConfigError | RecordError | PassingError:
    """What a response that is no success means. `where` names the model and its server."""
    told = f"HTTP {status}: {detail}" if detail else f"HTTP {status}"
    if status in PASSING or status >= 500:
        return PassingError(
            "server_error",
            told,
            retry_after_s=seconds_of(retry_after),
            is_servers=status == 429,
        )
    if status in RECORDS_OWN:
        is_long = any(words in detail.lower() for words in TOO_LONG)
        return RecordError("prompt_too_long" if is_long else "refused_by_server", told)
    if status in (401, 403):
        return ConfigError(f"{where} refuses the key, or its lack: {told}")
    return ConfigError(f"{where} cannot be asked so; is the URL right, and the name? {told}")


def seconds_of(retry_after: str | None) -> float:
    """The seconds that a Retry-After header asks for: a number, or until a date; 0 without one."""
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(retry_after)
        except ValueError:
            return 0.0
        seconds = when.timestamp() - time.time()
    return min(max(0.0, seconds), LONGEST_WAIT_S)


def down(where: str, error: PassingError, attempts: int) -> ServerError:
    """What to raise when a server fails whatever it is asked."""
    return ServerError(f"{where} does not answer, after {attempts} attempts: {error.detail}")
