"""Processes that rank shards and make rows beside the one that merges, on all cores.

    merging process ── order ──▶ helper:  rank a shard, or make its rows
                    ◀─ answers ─          in pieces, as they are taken

What is asked comes back in the order in which it was asked, whoever was faster, so that a dataset
does not depend on how many helpers there are. Small merges are done by one process. A helper is a
new interpreter with this one's path, not a fork: the merging process may hold a GPU and threads.
It ends when its standard input does, so that none outlives a merge that was killed.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, TypeVar

import msgspec

from stream_engine.config import OutputConfig, RunConfig
from stream_engine.errors import (
    ChangedError,
    ConservationError,
    ShardReadError,
    StreamEngineError,
)
from stream_engine.pairs.rankings import made_ranking
from stream_engine.pairs.rows import Chunk, RowMaker, RowsOrder
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import num_cores
from stream_engine.records import ShardInfo
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import Checksums, RankedShard
from stream_engine.store import files
from stream_engine.store.local import remove_leftovers
from stream_engine.text import describe

T = TypeVar("T")

SAMPLES_FOR_HELPERS = 2_000
"""Below that a helper would not have begun before the work is done."""
MAX_HELPERS = 16
ORDERS_AHEAD = 3  # for each helper
ANSWERS_AHEAD = 2  # of one order that wait to be taken
PATIENCE_S = 0.2
LENGTH = struct.Struct("<Q")
BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
BEGIN += "from stream_engine.pairs.helpers import serve; serve()"


class RankOrder(msgspec.Struct, frozen=True, kw_only=True, tag="rank"):
    """A shard to rank."""

    info: ShardInfo
    results: Checksums
    settings: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a helper must know before its first order."""

    root: str
    pipeline: str
    """`module:class`."""
    settings: dict[str, Any]
    """Those of the pipeline, and of what is written."""
    output: dict[str, Any]
    formats: list[str]


class Ranked(msgspec.Struct, frozen=True, tag="ranked"):
    ranking: RankedShard


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """There is no more to come of an order."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """An error that rises in the merging process, by its kind and what made it."""

    kind: str
    arguments: list[Any]


Order = RankOrder | RowsOrder
Answer = Ranked | Chunk
ERRORS: dict[str, type[Exception]] = {
    "ShardReadError": ShardReadError,
    "ChangedError": ChangedError,
    "ConservationError": ConservationError,
    "OSError": OSError,
}


class Crew:
    """Takes orders and gives the answers in order; a context manager."""

    def __init__(
        self,
        run_dir: RunDir,
        pipeline: Pipeline,
        output: OutputConfig,
        formats: list[str],
        *,
        num_samples: int,
    ) -> None:
        self.run_dir = run_dir
        self.pipeline = pipeline
        self.rows = RowMaker(run_dir, pipeline, output, formats)
        is_worth_it = num_samples >= SAMPLES_FOR_HELPERS and can_be_found(pipeline)
        self.num_helpers = min(MAX_HELPERS, num_cores()) if is_worth_it else 0
        self.job = Job(
            root=str(run_dir.root),
            pipeline=f"{type(pipeline).__module__}:{type(pipeline).__qualname__}",
            settings=pipeline.config.to_dict(),
            output=msgspec.to_builtins(output),
            formats=formats,
        )
        self.threads = ThreadPoolExecutor(max(1, self.num_helpers))
        self.idle: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        self.helpers: list[Helper] = []
        self.is_over = False
        if isinstance(run_dir.rankings_dir, Path):
            with suppress(OSError):  # rankings that cannot be kept are made twice
                remove_leftovers(run_dir.rankings_dir)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_over = True
        for helper in self.helpers:
            helper.end(at_once=error is not None)
        self.threads.shutdown(cancel_futures=True)

    def answers(self, orders: Iterable[tuple[T, Order | Answer]]) -> Iterator[tuple[T, Answer]]:
        """The answers to orders, each with what came with its order; known answers pass through.

        Orders are drawn ahead of the answers, by a few for each helper.
        """
        if not self.num_helpers:
            for label, order in orders:
                if isinstance(order, Answer):
                    yield label, order
                else:
                    yield from ((label, answer) for answer in carry_out(order, self.rows))
            return
        waiting: deque[tuple[T, Answer | Pieces]] = deque()
        for label, order in orders:
            waiting.append((label, order if isinstance(order, Answer) else self.begin(order)))
            while len(waiting) > ORDERS_AHEAD * self.num_helpers:
                yield from taken(*waiting.popleft())
        while waiting:
            yield from taken(*waiting.popleft())

    def rank(self, order: RankOrder) -> RankedShard:
        """The ranking of a shard, made by this process."""
        return rank(order, self.rows)

    def begin(self, order: Order) -> Pieces:
        """Have a helper carry out an order as soon as one is free."""
        if len(self.helpers) < self.num_helpers:
            self.helpers.append(Helper(self.job))
            self.idle.put(self.helpers[-1])
        answers: queue.Queue[Answer | None] = queue.Queue(ANSWERS_AHEAD)
        return Pieces(answers, self.threads.submit(self.oversee, order, answers))

    def oversee(self, order: Order, answers: queue.Queue[Answer | None]) -> None:
        """Hand an order to a free helper, and on what it answers; None is the end."""
        helper = self.idle.get()
        try:
            for answer in helper.carry_out(order):
                self.put(answers, answer)
        finally:
            self.idle.put(helper)
            self.put(answers, None)

    def put(self, answers: queue.Queue[Answer | None], answer: Answer | None) -> None:
        """Wait for room, as long as somebody may take something."""
        while not self.is_over:
            with suppress(queue.Full):
                answers.put(answer, timeout=PATIENCE_S)
                return


class Pieces(NamedTuple):
    """The answers to an order as they come, and what comes of it in the end."""

    answers: queue.Queue[Answer | None]
    future: Future[None]


def taken(label: T, source: Answer | Pieces) -> Iterator[tuple[T, Answer]]:
    """The answers to one order; an error of the helper rises here."""
    if not isinstance(source, Pieces):
        yield label, source
        return
    while (answer := source.answers.get()) is not None:
        yield label, answer
    source.future.result()


class Helper:
    """A process that carries out one order at a time."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-c", BEGIN, json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.decoder = msgspec.msgpack.Decoder(Ranked | Chunk | Ended | Failed)
        self.send(job)

    def send(self, what: Job | Order) -> None:
        assert self.process.stdin is not None
        write_frame(self.process.stdin, msgspec.msgpack.encode(what))

    def carry_out(self, order: Order) -> Iterator[Answer]:
        """The answers to an order.

        Raises:
            StreamEngineError: when the process has ended, or met what it cannot stand.
            Otherwise as `carry_out`.
        """
        assert self.process.stdout is not None
        try:
            self.send(order)
            while not isinstance(
                answer := self.decoder.decode(read_frame(self.process.stdout)), Ended
            ):
                if isinstance(answer, Failed):
                    raise ERRORS.get(answer.kind, StreamEngineError)(*answer.arguments)
                yield answer
        except (EOFError, BrokenPipeError) as error:
            status = self.process.wait()
            raise StreamEngineError(
                f"a process that helps to merge ended with status {status}; the same command "
                "merges again"
            ) from error

    def end(self, *, at_once: bool) -> None:
        """Let the process end; `at_once` when it may be at work."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if at_once:
            self.process.kill()
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Carry out what comes by standard input until it ends. The helper's own side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the merging process's to answer
    answers, orders = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # what a pipeline prints is no answer
    rows = begin_job(msgspec.msgpack.decode(read_frame(orders), type=Job))
    decoder = msgspec.msgpack.Decoder(RankOrder | RowsOrder)
    encode = msgspec.msgpack.Encoder().encode
    with suppress(EOFError, BrokenPipeError):
        while True:
            order = decoder.decode(read_frame(orders))
            try:
                for answer in carry_out(order, rows):
                    write_frame(answers, encode(answer))
                write_frame(answers, encode(Ended()))
            except BrokenPipeError:
                raise
            except Exception as error:  # noqa: BLE001  it rises in the merging process
                write_frame(answers, encode(failed(error)))


def begin_job(job: Job) -> RowMaker:
    """The settings of a helper as the merging process has them."""
    module, _, name = job.pipeline.partition(":")
    kind = operator.attrgetter(name)(importlib.import_module(module))
    pipeline = kind(RunConfig.create(job.settings))
    output = msgspec.convert(job.output, OutputConfig)
    run_dir = RunDir(job.root)
    files.trust(run_dir.root)
    return RowMaker(run_dir, pipeline, output, job.formats)


def carry_out(order: Order, rows: RowMaker) -> Iterator[Answer]:
    """What comes of an order, in any process.

    Raises:
        ChangedError: when a result is not the one that the order tells.
        ConservationError: when answers, scores and samples do not fit together.
        ShardReadError: when a file of the shard is damaged.
    """
    if isinstance(order, RowsOrder):
        yield from rows.chunks(order)
        return
    yield Ranked(rank(order, rows))


def rank(order: RankOrder, rows: RowMaker) -> RankedShard:
    """The ranking of a shard, made now."""
    return made_ranking(
        rows.run_dir, rows.pipeline, order.info, settings=order.settings, results=order.results
    )


def failed(error: Exception) -> Failed:
    """An error on its way to the merging process."""
    if isinstance(error, ShardReadError):
        return Failed(kind="ShardReadError", arguments=[error.path, error.detail, error.member])
    if isinstance(error, ChangedError):
        return Failed(kind="ChangedError", arguments=[error.path])
    if isinstance(error, ConservationError):
        return Failed(kind="ConservationError", arguments=[str(error)])
    if isinstance(error, OSError):
        arguments = [error.errno, error.strerror, error.filename]
        return Failed(kind="OSError", arguments=arguments if error.errno else [str(error)])
    traceback.print_exception(error)
    return Failed(kind="StreamEngineError", arguments=[describe(error)])


def can_be_found(pipeline: Pipeline) -> bool:
    """Whether another process can make this pipeline, by the name of its class."""
    kind, module = type(pipeline), sys.modules.get(type(pipeline).__module__)
    if not sys.executable or kind.__module__ == "__main__" or "<" in kind.__qualname__:
        return False
    return operator.attrgetter(kind.__qualname__)(module) is kind


def write_frame(file: IO[bytes], data: bytes) -> None:
    file.write(LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes:
    """The next frame.

    Raises:
        EOFError: when the other side has ended.
    """
    prefix = file.read(LENGTH.size)
    if len(prefix) == LENGTH.size:
        data = file.read(LENGTH.unpack(prefix)[0])
        if len(data) == LENGTH.unpack(prefix)[0]:
            return data
    raise EOFError
