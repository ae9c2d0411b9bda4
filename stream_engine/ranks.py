"""Which of the workers this process is. The only place that reads the launcher's environment.

torchrun and the deepspeed launcher set RANK, LOCAL_RANK and WORLD_SIZE; plain python sets none.
Ranks only choose a device, a log file and where in the shard list to begin, and the number of
workers shapes no result. A worker is one rank, or `tensor_parallel` consecutive ones that hold
each model together; only the latter ever make a process group (see team.py).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stream_engine.errors import ConfigError

SHARING_DEVICE = "STREAM_ENGINE_RANKS_SHARING_DEVICE"
"""Set by launchers that show each rank its own devices alone (work/ray_workers.py)."""


@dataclass(frozen=True)
class Rank:
    """One process among `world_size`, `local_world_size` of them on this host."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    threads_set: bool = False
    """Whether OMP_NUM_THREADS already says how many threads to use."""
    tensor_parallel: int = 1
    """Consecutive ranks that are one worker."""
    sharing_device: int | None = None
    """Ranks that share a device, where the launcher says so; None: it shows each rank all devices
    of the host."""

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] = os.environ, *, tensor_parallel: int = 1
    ) -> Rank:
        """Read the launcher's variables.

        Raises:
            ConfigError: when one is not a whole number, the rank is none of the world, or the ranks
                cannot form workers of `tensor_parallel` each.
        """

        def number(*names: str, default: int) -> int:
            for name in names:
                if text := environ.get(name):
                    try:
                        return int(text)
                    except ValueError as error:
                        message = f"environment variable {name} must be a number, it is {text!r}"
                        raise ConfigError(message) from error
            return default

        world_size, rank = number("WORLD_SIZE", default=1), number("RANK", default=0)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"environment variable RANK is {rank}, which is none of WORLD_SIZE {world_size}: a "
                "launcher sets both, and without one neither is set"
            )
        if world_size % tensor_parallel:
            raise ConfigError(
                f"tensor_parallel {tensor_parallel} needs a multiple of {tensor_parallel} ranks, "
                f"this run has {world_size}: start it with torchrun or deepspeed"
            )
        return cls(
            rank=rank,
            local_rank=number("LOCAL_RANK", default=0),
            world_size=world_size,
            # deepspeed calls it LOCAL_SIZE and does not set it for a single host
            local_world_size=number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size),
            threads_set="OMP_NUM_THREADS" in environ,
            tensor_parallel=tensor_parallel,
            sharing_device=number(SHARING_DEVICE, default=0) or None,
        )

    @property
    def worker(self) -> int:
        """Number of the worker that this rank is, or is part of."""
        return self.rank // self.tensor_parallel

    @property
    def num_workers(self) -> int:
        return self.world_size // self.tensor_parallel

    @property
    def place(self) -> int:
        """Which of its worker's ranks this is; the one at 0 leads."""
        return self.rank % self.tensor_parallel

    @property
    def worker_id(self) -> str:
        """Unique among live processes: `rank0@host:4711`."""
        return f"rank{self.rank}@{socket.gethostname()}:{os.getpid()}"

    @property
    def log_name(self) -> str:
        """Name of this worker's log file: the same for each run of a rank on a host.

        Nodes that were launched apart each have a rank 0, so the host is part of it.
        """
        return f"rank-{self.rank}-{socket.gethostname()}"

    def ranks_per_device(self, num_devices: int) -> int:
        """How many ranks may share one of the `num_devices` devices that this one sees."""
        return self.sharing_device or -(-self.local_world_size // num_devices)

    def num_threads(self) -> int:
        """This rank's share of the cores that the process may use."""
        return max(1, num_cores() // self.local_world_size)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def planned_device(rank: Rank, device: str) -> str:
    """The device that `set_device` would name, told without torch where there can be no other.

    Raises:
        ConfigError: when a CUDA device is asked for by name and there is none.
    """
    if device == "cpu" or (device == "auto" and not has_device_files()):
        return "cpu"
    return set_device(rank, device)


def has_device_files(root: Path = Path("/dev")) -> bool:
    """Whether a driver of a GPU has left its files; elsewhere than on Linux nobody knows."""
    names = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd")
    return not sys.platform.startswith("linux") or any(any(root.glob(name)) for name in names)


def set_device(rank: Rank, device: str) -> str:
    """The device of this rank: `cuda:LOCAL_RANK` for "auto" where there is CUDA, else "cpu".

    It becomes the current one, on which kernels are launched and graphs captured. Imports torch,
    and sets its number of threads unless the environment already did.

    Raises:
        ConfigError: when a CUDA device is asked for by name and there is none.
    """
    import torch

    if not rank.threads_set:
        torch.set_num_threads(rank.num_threads())
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but torch {torch.__version__} finds no CUDA device"
        )
    if device not in ("auto", "cuda"):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        return device
    index = rank.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return f"cuda:{index}"
