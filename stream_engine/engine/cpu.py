"""CPU execution: the processor's fastest GEMM, and memory that is not faulted in anew each step."""

from __future__ import annotations

import ctypes

from stream_kernels.cpu.tile_product import takes
from stream_kernels.gemm import linear, pack
from torch import Tensor, nn

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 32 << 20  # the most that glibc takes
KEPT_BYTES = 512 << 20


class OneDNNLinear(nn.Linear):
    """An nn.Linear by this processor's fastest product, its weight often in oneDNN's layout."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def pack_linears(module: nn.Module, *, keep: nn.Module | None = None) -> int:
    """Turn every plain nn.Linear (float32, bfloat16) in `module` into a OneDNNLinear, in place.

    A packed weight takes the old one's place, so memory stays the same; it can no longer be indexed
    or saved. `keep` is left alone (a head whose rows are read). Returns how many layers were
    turned: 0 where torch's own product is the fastest.
    """
    count = 0
    for layer in module.modules():
        if type(layer) is nn.Linear and layer is not keep:
            packed = pack(layer.weight.detach())
            if packed.is_mkldnn or takes(packed):
                layer.weight = nn.Parameter(packed, requires_grad=False)
                layer.__class__ = OneDNNLinear
                count += 1
    return count


def keep_freed_memory(num_bytes: int = KEPT_BYTES) -> bool:
    """Let this process's allocator keep up to `num_bytes` of freed memory for the next tensors.

    glibc gives large blocks back to the system at once, and every tensor of a forward of some
    thousand tokens is then faulted in page by page: elementwise operations run at a sixth of their
    speed. Returns False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, num_bytes)
    )
