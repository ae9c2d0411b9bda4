"""Inputs and float64 truths that several kernel tests share."""

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PrefixCase(NamedTuple):
    """The arguments of `prefix_attention`, in its order."""

    query: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    prefix_spans: Tensor
    group_rows: Tensor
    suffix_key: Tensor
    suffix_value: Tensor
    row_slots: Tensor
    suffix_lengths: Tensor


def prefix_case(
    *,
    group_sizes: list[int],
    prefix_lengths: list[int],
    suffix_lengths: list[int],
    heads: int = 4,
    kv_heads: int = 4,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PrefixCase:
    """Random questions: rows in no order, slots in no order, gaps in both slabs."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(group_sizes)
    assert len(suffix_lengths) == num_rows
    rows = list(range(num_rows))
    draw.shuffle(rows)
    group_rows = torch.full((len(group_sizes), max(group_sizes)), -1, dtype=torch.int32)
    spans, start = [], 3
    for group, (count, length) in enumerate(zip(group_sizes, prefix_lengths, strict=True)):
        members, rows = rows[:count], rows[count:]
        group_rows[group, :count] = torch.tensor(members, dtype=torch.int32)
        spans.append((start, length))
        start += length + 2
    num_slots, capacity = num_rows + 4, max(suffix_lengths) + 3
    slots = draw.sample(range(num_slots), num_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return PrefixCase(
        normal(num_rows, heads, size),
        normal(kv_heads, start + 5, size),
        normal(kv_heads, start + 5, size),
        torch.tensor(spans, dtype=torch.int32),
        group_rows,
        normal(num_slots, kv_heads, capacity, size),
        normal(num_slots, kv_heads, capacity, size),
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(suffix_lengths, dtype=torch.int32),
    )


def prefix_truth(case: PrefixCase, scale: float) -> Tensor:
    """float64 [R, Hq, D]: softmax over the keys a row may see, one row and head at a time."""
    out = torch.zeros(case.query.shape, dtype=torch.float64)
    repeats = case.query.shape[1] // case.prefix_key.shape[0]
    for group, members in enumerate(case.group_rows.tolist()):
        start, length = case.prefix_spans[group].tolist()
        for row in (member for member in members if member >= 0):
            slot, used = int(case.row_slots[row]), int(case.suffix_lengths[row])
            for head in range(case.query.shape[1]):
                shared = (head // repeats, slice(start, start + length))
                own = (slot, head // repeats, slice(0, used))
                keys = torch.cat([case.prefix_key[shared], case.suffix_key[own]]).double()
                values = torch.cat([case.prefix_value[shared], case.suffix_value[own]]).double()
                probs = torch.softmax(keys @ case.query[row, head].double() * scale, dim=0)
                out[row, head] = probs @ values
    return out


class Recorder(TorchDispatchMode):
    """Notes the operators called and the bytes of the largest tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.largest_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators.add(function.__name__)
        given = {_storage(argument) for argument in args if isinstance(argument, Tensor)}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and _storage(made) not in given:
                self.largest_bytes = max(self.largest_bytes, made.numel() * made.element_size())
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def chi_square_limit(degrees: int) -> float:
    """The 99.99 % quantile of chi-square (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3
