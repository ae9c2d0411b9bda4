"""ServerModel: a model that a server runs, in the place of an engine; asked in words alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from stream_engine.config import SamplingConfig
from stream_engine.remote.exchange import Exchange, Outcome
from stream_engine.remote.keys import key_of
from stream_engine.remote.messages import DEFAULT_MAX_TOKENS, ChatRequest
from stream_engine.servers import ServedModel, ServerConfig

END_PATIENCE_S = 10.0
"""How long a call that is given up waits for its requests to be given up, too."""


class ServerModel:
    """One model on a server, for one role. It holds no connection between two calls."""

    def __init__(
        self, role: str, address: ServedModel, sampling: SamplingConfig, settings: ServerConfig
    ) -> None:
        """
        Raises:
            ConfigError: for a key that cannot be one.
        """
        self.role = role
        self.address = address
        self.sampling = sampling
        self.settings = settings
        self._key = key_of(role)
        self._left_out: set[str] = set() if settings.server_seeds else {"seed"}

    def complete(
        self, requests: Iterable[ChatRequest]
    ) -> Iterator[tuple[tuple[str, ...], Outcome]]:
        """(name, reply) of every request in order of completion; a RecordError where one fails.

        Raises:
            ServerError: when the server answers nobody.
            ConfigError: when it refuses the key, the name or the settings.
        """
        told: SimpleQueue[tuple[tuple[str, ...], Outcome] | None] = SimpleQueue()
        exchange = Exchange(
            self.role, self.address, self.sampling, self.settings, self._key, self._left_out
        )
        loop = asyncio.new_event_loop()
        task = loop.create_task(
            exchange.run(requests, lambda name, outcome: told.put((name, outcome)))
        )
        thread = threading.Thread(target=drive, args=(loop, task, told), daemon=True)
        thread.start()
        try:
            while (item := told.get()) is not None:
                yield item
            task.result()
        finally:
            with suppress(RuntimeError):  # the loop is closed: all is done
                loop.call_soon_threadsafe(task.cancel)
            thread.join(END_PATIENCE_S)

    def describe(self) -> dict[str, Any]:
        """What is asked, in plain values, for run.json and the report."""
        values = {
            name: getattr(self.sampling, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        }
        return {
            "checkpoint": self.address.name,
            "family": "openai",
            "server": self.address.url,
            "device": "a server",
            "dtype": "its own",
            "sampling": {
                **{name: value for name, value in values.items() if value is not None},
                "max_new_tokens": self.sampling.max_new_tokens or DEFAULT_MAX_TOKENS,
            },
        }

    def close(self) -> None:
        """Nothing is held."""


def drive(
    loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], told: SimpleQueue[Any]
) -> None:
    """Run a task to its end, however it ends, and tell that it did."""
    try:
        loop.run_until_complete(asyncio.wait({task}))
    finally:
        loop.close()
        told.put(None)
