"""Team: a tensor-parallel group of ranks, which acts as one worker (--tensor_parallel).

The first rank leads: it does all that a worker alone does (leases, reading, writing, merging), and
whenever models are loaded or asked, the other ranks do the same beside it, with the inputs that it
sends them. They touch neither leases nor results.

    leader                                   follower
    announce Load          ───────────────▶  receive
    load engines                             load engines
    compare notes          ◀──────────────▶  compare notes
    announce Compute       ───────────────▶  receive
    pipeline.rollouts ...                    pipeline.rollouts ...
    compare notes          ◀──────────────▶  compare notes
    announce End           ───────────────▶  return

Inside the two steps all ranks compute the same (engine/parallel.py). The notes tell whether they
did: what was drawn, or which error was raised. An error that all ranks share is handled as a worker
alone would (the shard is tried again, a bad record is set aside). Anything else ends the team with
a ParallelError: the launcher ends the run, its leases are released or go stale, and the same
command resumes. A rank that dies closes its connections, which ends the others at once; one that
hangs ends them after a timeout.

Each team is a torch.distributed world of its own; teams meet in the run directory only. Of a run
with several rounds each makes such a world, and ends it, in the same processes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stream_engine.config import Stage
from stream_engine.errors import ConfigError, ParallelError, RoundOverError
from stream_engine.ranks import Rank, set_device
from stream_engine.records import Failure, SampleRewards, SampleRollouts
from stream_engine.work.catching import UNMENDABLE, caught

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store


logger = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = SampleRollouts | SampleRewards | Failure

FORWARD_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in the middle of a forward."""
STEP_TIMEOUT = timedelta(minutes=30)
"""How long it waits between steps: one rank may read its weights from a slower drive."""
ALONE_TIMEOUT = timedelta(seconds=60)
"""How long a rank that raised waits for the others to say that they did, too."""
BEAT_S = 20.0
NOTE_BYTES = 512


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load the engines of these stages; see `LoadedEngines.get`."""

    needed: tuple[Stage, ...]
    keep: tuple[Stage, ...]
    one_at_a_time: bool


class Compute(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run a stage on inputs: Samples, or for rewards (Sample, SampleRollouts), as msgpack."""

    stage: Stage
    inputs: bytes


class End(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The run is over for this team; `error` says why, when it should not be."""

    error: str = ""
    is_round_over: bool = False
    """Whether that is because others went on to the next round, as this team may then do."""


Message = Load | Compute | End
_decode_message = msgspec.msgpack.Decoder(Message).decode


class Team:
    """This rank's place in its team. A context manager: the leader's exit ends the team."""

    def __init__(self, rank: Rank, control: ProcessGroup) -> None:
        self.rank = rank
        self.control = control
        self._is_busy = False  # the ranks are inside a step: nobody listens
        self._lost: ParallelError | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="team", daemon=True)
        if self.leads:
            self._heart.start()

    @classmethod
    def join(cls, rank: Rank, device: str) -> Team:
        """Meet the other ranks of this rank's team; `device` as in the settings.

        Raises:
            ConfigError: when no launcher said where the ranks meet.
            ParallelError: when they do not come.
        """
        import torch.distributed as dist

        join_world(rank, set_device(rank, device))
        return cls(rank, dist.new_group(backend="gloo", timeout=STEP_TIMEOUT))

    @property
    def leads(self) -> bool:
        return self.rank.place == 0

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import torch.distributed as dist

        self._stop.set()
        if self.leads:
            self._heart.join()
        is_round_over = isinstance(error, RoundOverError)
        if error is None or is_round_over:
            if self.leads:
                self.announce(End(error=str(error or ""), is_round_over=is_round_over))
            dist.destroy_process_group()
        elif self.leads and not isinstance(error, ParallelError):
            with suppress(ParallelError):
                self.announce(End(error=str(error) or type(error).__name__))

    # -- the leader's part -----------------------------------------------------------------------

    def load(
        self,
        needed: tuple[Stage, ...],
        keep: tuple[Stage, ...],
        one_at_a_time: bool,
        work: Callable[[], T],
    ) -> T:
        """The result of `work`, `LoadedEngines.get`, while the followers load theirs."""
        self.announce(Load(needed=needed, keep=keep, one_at_a_time=one_at_a_time))
        return self.loaded(work)

    def lead(
        self, stage: Stage, inputs: Sequence[object], run: Callable[[], Iterator[Outcome]]
    ) -> Iterator[Outcome]:
        """The outcomes of `run`, a stage on these inputs, while the followers run it, too.

        Raises:
            ParallelError: when the ranks came to different ends.
        """
        self.announce(Compute(stage=stage, inputs=msgspec.msgpack.encode(inputs)))
        yield from self.in_step(run)

    def announce(self, message: Message) -> None:
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._is_busy:
                raise ParallelError("a step of this worker's ranks was given up in the middle")
            self._is_busy = not isinstance(message, End)
            self._send(msgspec.msgpack.encode(message))

    def _beat(self) -> None:
        """Let the followers know, while there is nothing to do, that there may be."""
        while not self._stop.wait(BEAT_S):
            with self._lock:
                if not self._is_busy and self._lost is None:
                    try:
                        self._send(b"")
                    except ParallelError as error:
                        self._lost = error

    # -- a follower's part -----------------------------------------------------------------------

    def receive(self) -> Message:
        """The leader's next message."""
        while not (payload := self._receive()):
            pass
        return _decode_message(payload)

    # -- the same on every rank ------------------------------------------------------------------

    def loaded(self, work: Callable[[], T]) -> T:
        result = caught(work)
        self.compare(result if isinstance(result, Exception) else None)
        if isinstance(result, Exception):
            raise result
        return result

    def in_step(self, run: Callable[[], Iterator[Outcome]]) -> Iterator[Outcome]:
        """The outcomes of `run`; at the end the ranks compare what steered their forwards."""
        digest = hashlib.blake2b(digest_size=8)
        outcomes = caught(run)
        while not isinstance(outcomes, Exception):
            outcome = caught(functools.partial(next, outcomes, None))
            if isinstance(outcome, Exception):
                outcomes = outcome
            elif outcome is None:
                break
            else:
                digest.update(drawn(outcome))
                yield outcome
        error = outcomes if isinstance(outcomes, Exception) else None
        self.compare(error, digest.hexdigest())
        if error is not None:
            raise error

    def compare(self, error: Exception | None, digest: str = "") -> None:
        """Tell the others how this rank's step ended.

        Raises:
            ParallelError: when theirs ended otherwise. Errors that end the run rise at once.
        """
        if isinstance(error, UNMENDABLE):
            raise error
        end = "no error" if error is None else type(error).__name__
        told = "" if error is None else f": {first_line(error)}"
        notes = self._exchange(
            f"{digest}\0{end}\0{told}", STEP_TIMEOUT if error is None else ALONE_TIMEOUT
        )
        self._is_busy = False
        if len({tuple(note.split("\0")[:2]) for note in notes}) > 1:
            ends = [f"rank {i}: {''.join(note.split(chr(0))[1:])}" for i, note in enumerate(notes)]
            raise ParallelError(f"this worker's ranks fell out of step ({'; '.join(ends)})")

    def _exchange(self, note: str, timeout: timedelta) -> list[str]:
        """The notes of all ranks, in order."""
        import torch
        import torch.distributed as dist

        own = torch.zeros(NOTE_BYTES, dtype=torch.uint8)
        encoded = note.encode()[:NOTE_BYTES]
        own[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        notes = [torch.empty_like(own) for _ in range(self.rank.tensor_parallel)]
        try:
            work = dist.all_gather(notes, own, group=self.control, async_op=True)
            assert work is not None
            work.wait(timeout)
        except RuntimeError as error:
            what = note.split("\0", 1)[1].replace("\0", "")
            raise ParallelError(
                f"rank {self.rank.rank} ended a step ({what}), and another rank of its worker did "
                f"not: {first_line(error)}"
            ) from error
        return [bytes(n.tolist()).rstrip(b"\0").decode(errors="ignore") for n in notes]

    def _send(self, payload: bytes) -> None:
        import torch

        self._broadcast(torch.tensor([len(payload)]))
        if payload:
            self._broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))

    def _receive(self) -> bytes:
        import torch

        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        payload = torch.empty(int(length), dtype=torch.uint8)
        if len(payload):
            self._broadcast(payload)
        return payload.numpy().tobytes()

    def _broadcast(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        try:
            dist.broadcast(tensor, src=0, group=self.control)
        except RuntimeError as error:
            raise ParallelError(
                f"another rank of this worker ended: {first_line(error)}"
            ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that torch and gloo may add."""
    return (str(error).splitlines() or [""])[0][:200]


def drawn(outcome: Outcome) -> bytes:
    """What of an outcome steers the ranks: log-probs may differ in rounding, tokens may not."""
    tokens: list[list[int]] = []
    if isinstance(outcome, SampleRollouts):
        tokens = [answer.token_ids for answer in outcome.answers]
    reason = outcome.reason if isinstance(outcome, Failure) else ""
    return msgspec.msgpack.encode((outcome.key, reason, tokens))


def join_world(rank: Rank, device: str) -> None:
    """Make the ranks of a team a torch.distributed world, apart from those of other teams.

    Raises: as `Team.join`.
    """
    import torch
    import torch.distributed as dist

    own_gpu = device.startswith("cuda") and torch.cuda.device_count() >= rank.local_world_size
    try:
        name = f"stream_engine/worker{rank.worker}/{next(_worlds)}"
        dist.init_process_group(
            "nccl" if own_gpu else "gloo",
            store=dist.PrefixStore(name, meeting_place()),
            rank=rank.place,
            world_size=rank.tensor_parallel,
            timeout=FORWARD_TIMEOUT,
        )
    except ValueError as error:
        raise ConfigError(f"tensor_parallel needs torchrun or deepspeed: {error}") from error
    except RuntimeError as error:
        raise ParallelError(f"not all ranks of worker {rank.worker} came: {error}") from error


_worlds = itertools.count()
"""The worlds that this process has been in: each of a team's ranks counts the same."""


@functools.cache
def meeting_place() -> Store:
    """Where the launcher's ranks meet, kept for all worlds: one rank's process may hold it."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=FORWARD_TIMEOUT))
    return store
