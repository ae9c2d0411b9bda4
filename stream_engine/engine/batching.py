"""How much goes into one forward: a budget that halves on out-of-memory and recovers.

Also the host's side of batching: prompts prepared ahead of the device, in threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from stream_engine.errors import ConfigError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

logger = logging.getLogger(__name__)

RECOVERY_STEPS = 64
"""Successful forwards after which a halved budget grows again."""


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
