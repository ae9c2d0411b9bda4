"""What launches agree on: the device, the sizes of tiles, how many programs fill a card."""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
from torch import Tensor

ResultT = TypeVar("ResultT")


def on_own_device(wrapper: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """Let a wrapper launch on its first tensor's device: Triton's is the one that is current."""

    @functools.wraps(wrapper)
    def launch(first: Tensor, *arguments, **options) -> ResultT:
        with torch.cuda.device_of(first):  # nothing for a tensor that is not on a GPU
            return wrapper(first, *arguments, **options)

    return launch


def tile_options(most_rows: int, size: int, itemsize: int) -> dict[str, int]:
    """Tile, warps and stages of an attention kernel, for `most_rows` query rows of heads of `size`.

    Float32 products are exact, and so no work for the matrix units: in larger tiles a thread's
    share of them exceeds its registers, and the tiles themselves the shared memory.
    """
    is_exact = itemsize == 4
    largest = 32 if is_exact else 128 if size <= 128 else 64
    block_m = min(largest, max(16, triton.next_power_of_2(most_rows)))
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(size)),
        "BLOCK_M": block_m,
        "BLOCK_N": 16 if is_exact else 64 if size <= 128 else 32,
        "num_warps": 8 if block_m == largest else 4,
        "num_stages": 2 if is_exact or size > 128 else 3,
    }


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 8 for the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
