"""Exchange: requests to one model on a server, many at a time, each tried again while it may help.

a request that is refused, or fails for good while the server answers others   RecordError
a server that answers nobody, not even a plain question                        ServerError
a wrong key, URL or name, or a setting that the server refuses                 ConfigError
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from stream_engine.config import SamplingConfig
from stream_engine.errors import ConfigError, RecordError
from stream_engine.remote import usage
from stream_engine.remote.failures import PassingError, down, failure_of
from stream_engine.remote.keys import without_key
from stream_engine.remote.messages import (
    ChatRequest,
    Completion,
    body_of,
    concession,
    detail_of,
    read_completion,
)
from stream_engine.servers import ServedModel, ServerConfig
from stream_engine.text import one_line

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0
SAY_EVERY_S = 10.0
CONNECT_TIMEOUT_S = 20.0
PLAIN = ChatRequest(("plain",), "Say yes.")
"""A question that any server answers that answers at all."""

Outcome = Completion | RecordError


class Exchange:
    """Lives in one event loop, for the requests of one call."""

    def __init__(
        self,
        role: str,
        address: ServedModel,
        sampling: SamplingConfig,
        settings: ServerConfig,
        key: str,
        left_out: set[str],
    ) -> None:
        """`left_out` is added to: parts of requests that this server was found not to take."""
        self.role = role
        self.address = address
        self.sampling = sampling
        self.settings = settings
        self.left_out = left_out
        self.where = f"{role}'s server {address.url} (model {address.name})"
        self._key = key
        self.num_answered = 0
        self.not_before = 0.0  # of the loop's clock: when a server that was asked too much may be
        self.next_start = 0.0
        self.say_again = 0.0
        self.num_troubles = 0

    async def run(
        self, requests: Iterable[ChatRequest], tell: Callable[[tuple[str, ...], Outcome], None]
    ) -> None:
        """Ask them all and tell each outcome as it comes.

        Raises:
            ServerError, ConfigError: see this module.
        """
        import httpx2

        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx2.Timeout(self.settings.server_timeout_s, connect=CONNECT_TIMEOUT_S)
        limits = httpx2.Limits(max_connections=self.settings.server_requests + 1)
        left = iter(requests)
        async with httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client:
            num_at_once = self.settings.server_requests
            tasks = [
                asyncio.create_task(self.ask_in_turn(client, left, tell))
                for _ in range(num_at_once)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def ask_in_turn(
        self,
        client: httpx2.AsyncClient,
        left: Iterator[ChatRequest],
        tell: Callable[[tuple[str, ...], Outcome], None],
    ) -> None:
        """Ask one after the other of what nobody else has begun."""
        for request in left:
            try:
                outcome: Outcome = await self.patiently(client, request)
            except RecordError as error:
                outcome = error
            tell(request.name, outcome)

    async def patiently(self, client: httpx2.AsyncClient, request: ChatRequest) -> Completion:
        """The reply to a request, which is sent again after errors that may pass."""
        attempt = 0
        while True:
            answered_before = self.num_answered
            try:
                return await self.once(client, request)
            except PassingError as error:
                failed = error
            except RecordError as error:
                if not self.num_answered:
                    await self.check_plain(client, error)
                raise
            is_limit = failed.is_servers and failed.retry_after_s > 0
            # While the server lets others in, being told to wait is no failure.
            attempt += not (is_limit and self.num_answered > answered_before)
            if attempt > self.settings.server_retries:
                break
            await self.wait(attempt, failed)
        if failed.is_servers:
            raise down(self.where, failed, attempt)
        try:
            await self.once(client, PLAIN)
        except (PassingError, RecordError) as error:
            raise down(self.where, failed, attempt) from error
        raise RecordError(failed.reason, f"{failed.detail}, {attempt} times")

    async def check_plain(self, client: httpx2.AsyncClient, refused: RecordError) -> None:
        """Tell a refused record from refused settings, by a question that has nothing of its own.

        Raises:
            ConfigError: when the server refuses that, too.
        """
        try:
            await self.once(client, PLAIN)
        except RecordError as error:
            raise ConfigError(
                f"{self.where} refuses whatever it is asked with these settings: {error.detail}"
            ) from error
        except PassingError:
            return

    async def once(self, client: httpx2.AsyncClient, request: ChatRequest) -> Completion:
        """The reply to a request that is sent once, or in every form that this server may take."""
        while True:
            body = body_of(
                request, self.address.name, self.sampling, left_out=frozenset(self.left_out)
            )
            status, headers, content = await self.post(client, body)
            if status == 200:
                completion = read_completion(content)
                self.num_answered += 1
                usage.count(
                    self.role,
                    prompt_tokens=completion.prompt_tokens,
                    completion_tokens=completion.completion_tokens,
                )
                return completion
            detail = without_key(detail_of(content), self._key)
            part = concession(body, detail) if status in (400, 422) else None
            if part is None:
                retry_after = headers.get("retry-after")
                raise failure_of(status, detail, where=self.where, retry_after=retry_after)
            if part not in self.left_out:
                logger.info("%s takes no %s as it was sent: %s", self.where, part, detail)
            self.left_out.add(part)

    async def post(
        self, client: httpx2.AsyncClient, body: dict[str, Any]
    ) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and content of a response.

        Raises:
            PassingError: when there is none, or not a whole one.
        """
        import httpx2

        await self.turn()
        url = f"{self.address.url}/chat/completions"
        try:
            response = await asyncio.wait_for(
                client.post(url, json=body), self.settings.server_timeout_s
            )
        except (asyncio.TimeoutError, httpx2.ReadTimeout) as error:
            waited = f"no reply within {self.settings.server_timeout_s:g} s"
            raise PassingError("timeout", waited) from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            told = without_key(one_line(error), self._key)
            raise PassingError(
                "no_connection", f"no connection ({told})", is_servers=True
            ) from None
        except httpx2.HTTPError as error:
            told = without_key(one_line(error), self._key)
            raise PassingError(
                "connection_lost", f"the connection was lost ({type(error).__name__}: {told})"
            ) from None
        return response.status_code, response.headers, response.content

    async def turn(self) -> None:
        """Wait until a request may begin."""
        clock = asyncio.get_running_loop().time
        while (wait_s := self.not_before - clock()) > 0:
            await asyncio.sleep(wait_s * random.uniform(1.0, 1.1))
        if self.settings.server_requests_per_minute:
            start = max(clock(), self.next_start)
            self.next_start = start + 60 / self.settings.server_requests_per_minute
            await asyncio.sleep(start - clock())

    async def wait(self, attempt: int, failed: PassingError) -> None:
        """Let time pass before a request is sent again; all wait where the server said how long."""
        clock = asyncio.get_running_loop().time
        backoff_s = self.settings.server_backoff_s * 2 ** max(0, attempt - 1)
        wait_s = min(backoff_s, LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
        if failed.retry_after_s:
            self.not_before = max(self.not_before, clock() + failed.retry_after_s)
        wait_s = max(wait_s, failed.retry_after_s)
        self.num_troubles += 1
        if clock() >= self.say_again:  # of sixteen requests that fail alike one line is enough
            self.say_again = clock() + SAY_EVERY_S
            text = "%s: %s; asked again in %.1f s (%d failed so far)"
            logger.info(text, self.where, failed.detail, wait_s, self.num_troubles)
        await asyncio.sleep(wait_s)
