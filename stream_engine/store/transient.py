"""Errors of disks and stores that pass: what is read is tried again, and then named as unreachable.

A file that is not there, or may not be read, is another matter: waiting does not bring it.
"""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

WAITS_S = (0.5, 2.0, 8.0)
"""Before each further try."""

LASTING = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
    )
)
"""Codes that say something of the file, not of the way to it."""


def network_errors() -> tuple[type[Exception], ...]:
    """What S3 and HTTP clients raise beside OSErrors; known once their packages are loaded."""
    errors: list[type[Exception]] = []
    if "botocore" in sys.modules:
        from botocore.exceptions import BotoCoreError

        errors.append(BotoCoreError)
    if "aiohttp" in sys.modules:
        from aiohttp import ClientError

        errors.append(ClientError)
    return tuple(errors)


def is_transient(error: BaseException) -> bool:
    """Whether an error says that something could not be reached now.

    An OSError without a code is a library's word for broken content (pyarrow, gzip), or fsspec's
    for a file that is not there.
    """
    if isinstance(error, (TimeoutError, ConnectionError, *network_errors())):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in LASTING


def patiently(read: Callable[[], T]) -> T:
    """The result of `read`, which is called again after errors that may pass."""
    for wait_s in WAITS_S:
        try:
            return read()
        except OSError as error:
            passing: Exception = error
        except network_errors() as error:
            passing = error
        if not is_transient(passing):
            raise passing
        wait(wait_s, passing)
    return read()


def wait(wait_s: float, error: BaseException) -> None:
    """Let time pass before the next try."""
    logger.info("trying again in %g s: %s", wait_s, error)
    time.sleep(wait_s)
