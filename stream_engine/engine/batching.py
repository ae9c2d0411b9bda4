"""How much goes into one forward: a budget that halves on out-of-memory and recovers.

Also the host's side of batching: prompts prepared ahead of the device, in threads.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from stream_engine.errors import ConfigError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

logger = logging.getLogger(__name__)

ACCELERATOR_ERRORS = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
"""torch has a type for errors of a device since 2.8; before, its RuntimeError says so in words."""

RECOVERY_STEPS = 64
"""Successful forwards after which a halved budget grows again."""

DEVICE_ERROR = re.compile(
    r"(cuda|cudnn|cublas|hip|triton) error|device-side assert|illegal memory access", re.IGNORECASE
)
OUT_OF_MEMORY = re.compile(
    r"not enough memory|(cuda|hip)( driver)?( error|\]): out of memory|_ALLOC(ATION)?_FAILED"
    r"|NOT_INITIALIZED when calling .?cublasCreate",  # which allocates its workspace
    re.IGNORECASE,
)
ONE_CALL = re.compile(
    r"invalid (argument|configuration|value|device function|resource handle)|_INVALID_VALUE"
    r"|_BAD_PARAM|not_supported|not supported|unsupported|_mismatch|too many resources|PTX"
    r"|device ordinal|no kernel image|kernel image is invalid|capture|capturing|out of memory"
    r"|out of resource",
    re.IGNORECASE,
)
"""What a device says of a call that it refused: the next call may do better."""


@dataclass
class TokenBudget:
    """Limits of one forward: packed tokens of a prefill or extension, rows of a decode step."""

    max_tokens: int
    max_rows: int
    can_halve: bool = True
    scale: float = 1.0
    _successes: int = 0

    @property
    def tokens(self) -> int:
        return max(1, int(self.max_tokens * self.scale))

    @property
    def rows(self) -> int:
        return max(1, int(self.max_rows * self.scale))

    @property
    def is_minimal(self) -> bool:
        """Whether halving again would change nothing."""
        return self.rows == 1 and self.tokens <= 256

    def halve(self) -> None:
        """Make the next forwards smaller.

        Raises:
            ConfigError: when this rank cannot decide that alone.
        """
        if not self.can_halve:
            raise ConfigError(
                "out of memory: ranks that hold a model together cannot go on with smaller batches "
                f"by themselves; give less than --max_batch_tokens {self.max_tokens} or --max_rows "
                f"{self.max_rows}"
            )
        self.scale /= 2
        self._successes = 0
        logger.warning("out of memory: going on with %d tokens and %d rows", self.tokens, self.rows)

    def succeed(self) -> None:
        """Count a forward that fitted; enough of them let a halved budget grow by half."""
        if self.scale < 1.0:
            self._successes += 1
            if self._successes >= RECOVERY_STEPS:
                self.scale = min(1.0, self.scale * 1.5)
                self._successes = 0
                logger.info("budget back to %d tokens and %d rows", self.tokens, self.rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether an error means that this process can compute no more on its device.

    A failed assertion in a kernel, an illegal access or a memory fault spoils the whole CUDA
    context: every further call gives the same error, whatever record it is for. Errors that speak
    of their own call alone (a wrong argument, no memory) do not count.
    """
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    text, *_ = str(error).splitlines() or [""]  # the lines after it are hints
    says_device = isinstance(error, ACCELERATOR_ERRORS) or DEVICE_ERROR.search(text) is not None
    return says_device and ONE_CALL.search(text) is None


def map_ahead(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, threads: int, ahead: int
) -> Iterator[ResultT]:
    """`map(function, items)` in order, with up to `ahead` results being made by `threads`."""
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        pending: deque[Future[ResultT]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
