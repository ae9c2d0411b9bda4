"""What torch's errors say of the device: that memory ran out, or that the device is lost.

Drivers and libraries say either in many words, of which some have a type of their own.
"""

from __future__ import annotations

import re

import torch

ACCELERATOR_ERRORS = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
"""torch has a type for errors of a device since 2.8; before, its RuntimeError says so in words."""

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def hidden_out_of_memory(error: BaseException) -> BaseException | None:
    """The error that memory ran out of, where it is this one or lies behind it, else None.

    What ends badly because of it (a capture, say) may raise an error of its own in its place.
    """
    seen: list[BaseException] = []
    behind: BaseException | None = error
    while behind is not None and behind not in seen:
        if is_out_of_memory(behind):
            return behind
        seen.append(behind)
        behind = behind.__cause__ or behind.__context__
    return None


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
