"""Counter-based random numbers: a pure function of (seed, position), with no generator to carry.

It knows nothing of batches, which is the point: a row's number does not depend on its neighbours.
"""

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014): the increment and the two multipliers of its finaliser,
# as signed 64-bit numbers because torch's int64 arithmetic wraps around.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in the open interval (0, 1) for each (seed, position), equal on every device.

    `seeds` and `positions` are int64 and broadcast together; the result is float64 with 52 random
    bits: splitmix64's mix of (mix of the seed) + (position + 1) * increment.
    """
    assert seeds.dtype == torch.int64 and positions.dtype == torch.int64
    bits = _mix(_mix(seeds) + (positions + 1) * _INCREMENT)
    # 52 bits and a half: the largest value, 1 - 2**-53, is still representable below 1.
    return (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of the 64-bit numbers."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """The logical shift; `>>` of a signed tensor would copy the sign bit in."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
