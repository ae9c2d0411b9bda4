"""One request to an object store, and its errors as those of a disk. Knows no version, no lease."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from stream_engine.store.base import Location
from stream_engine.text import one_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

T = TypeVar("T")


def retries(most: int, *, timeout_s: float, longest_wait_s: float, base: float) -> Any:
    """obstore's settings: a wait is drawn between the first one and `base` times the last one."""
    backoff = {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=longest_wait_s),
        "base": base,
    }
    timeout = timedelta(seconds=timeout_s)
    return {"max_retries": most, "retry_timeout": timeout, "backoff": backoff}


RETRIES = retries(8, timeout_s=90, longest_wait_s=5, base=5)
"""Some 20 seconds in all: a store that is asked for too much refuses for seconds. obstore's own
`base` of 2 comes to two."""
FIRST_RETRIES = retries(5, timeout_s=6, longest_wait_s=2, base=3)
"""The same of the first request: where nobody answers for some seconds the address is wrong."""
MOST_BREAKS = 3
REMEDY = "can the store be reached from here, and are its address, region and credentials set?"
NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")
NO_CONNECTION = re.compile(r"kind: Connect\b")
ADDRESS = re.compile(r"Error performing [A-Z]+ (\w+://[^/\s]+)")
CAUSE = re.compile(r'(?:message|error): "([^"]+)"')
"""What obstore says of a request that found nobody to answer it."""
BROKEN_OFF = re.compile(r"\b\w+ResponseBody\b")
SAID = re.compile(r"<Code>([^<]+)</Code>(?:\s*<Message>([^<]*)</Message>)?")
"""What a store says of an error, in the body of its answer."""


class ConditionError(Exception):
    """The condition of a put does not hold."""


class BrokenOffError(OSError):
    """An answer that said "done" broke off in its midst; obstore does not ask again then."""


def ask(path: Location | str, request: Callable[..., T], *args: Any, **options: Any) -> T:
    """The answer to a request; what fails it is an OSError, as a disk's would be.

    Raises:
        FileNotFoundError: for an object that is not there.
        ConditionError: when the condition of a put does not hold.
        OSError: for everything else, after the tries that obstore makes by itself. A bucket that is
            not there is no absent object: whatever a run has lies in it.
    """
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        return request(*args, **options)
    except (AlreadyExistsError, PreconditionError) as error:
        raise ConditionError from error
    except (BaseError, FileNotFoundError) as error:
        if NO_BUCKET.search(str(error)):
            raise no_bucket(path) from error
        if isinstance(error, FileNotFoundError):
            raise
        found = SAID.search(str(error))
        said = f"{found[1]}: {found[2] or ''}" if found else one_line(error)
        kind = BrokenOffError if BROKEN_OFF.search(str(error)) else OSError
        raise kind(errno.EIO, f"{said} ... ({REMEDY})", str(path)) from error


def reach(root: str, bucket: Bucket) -> None:
    """Ask for an object that need not be there: any answer will do.

    Raises:
        OSError: when nobody answers at the store's address; no later try is worth while.
    """
    import obstore
    from obstore.exceptions import BaseError

    try:
        obstore.head(bucket, ".reached")
    except (BaseError, FileNotFoundError) as error:
        said = str(error)
        if NO_CONNECTION.search(said):
            address, cause = ADDRESS.search(said), CAUSE.search(said)
            who = f"nobody answers at {address[1] if address else 'the address of the store'}"
            what = f"{who} ({cause[1] if cause else one_line(error)}): {REMEDY}"
            raise OSError(errno.ENXIO, what, root) from error


def no_bucket(path: Location | str) -> OSError:
    """The error of a bucket that is not there; no later try will find it."""
    return OSError(errno.ENXIO, "there is no such bucket; make it, or name another", str(path))


def in_whole(request: Callable[[], T]) -> T:
    """The answer to a request that may be sent again, and is where its answer breaks off."""
    for _ in range(MOST_BREAKS):
        with suppress(BrokenOffError):
            return request()
    return request()


def content(path: Location, bucket: Bucket, key: str, **options: Any) -> tuple[Any, Any]:
    """An answer to a get, and all its bytes (a buffer), which may break off. Raises as `ask`."""
    import obstore

    found = ask(path, obstore.get, bucket, key, **options)
    return found, ask(path, found.bytes)
