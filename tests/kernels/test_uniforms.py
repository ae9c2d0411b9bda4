import torch
from stream_kernels import uniforms

from tests.kernels.cases import chi_square_limit

MASK = (1 << 64) - 1


def splitmix(bits: int) -> int:
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK
    return bits ^ bits >> 31


def test_numbers_are_those_of_exact_integer_arithmetic() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    positions = [0, 1, 149, 2**31, 7, 0]
    expected = []
    for seed, position in zip(seeds, positions, strict=True):
        bits = splitmix(splitmix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15 & MASK)
        expected.append(((bits >> 12) + 0.5) / 2**52)
    got = uniforms(torch.tensor(seeds), torch.tensor(positions))
    assert got.dtype == torch.float64
    assert got.tolist() == expected


def test_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    counting, zero = torch.arange(64_000), torch.zeros(64_000, dtype=torch.int64)
    for seeds, positions in [(counting, zero), (zero, counting), (counting // 250, counting % 250)]:
        numbers = uniforms(seeds, positions)
        assert numbers.min() > 0 and numbers.max() < 1
        counts = torch.histc(numbers, bins=64, min=0, max=1)
        assert ((counts - 1000) ** 2 / 1000).sum() < chi_square_limit(63)


def test_neighbouring_positions_are_uncorrelated() -> None:
    numbers = uniforms(torch.full((50_000,), 7), torch.arange(50_000)) - 0.5
    assert abs((numbers[1:] * numbers[:-1]).mean() * 12) < 0.02


def test_a_number_does_not_depend_on_its_batch() -> None:
    seeds, positions = torch.arange(300) * 977, torch.arange(300) % 13
    together = uniforms(seeds, positions)
    alone = torch.cat([uniforms(seeds[i : i + 1], positions[i : i + 1]) for i in range(300)])
    assert torch.equal(together, alone)
