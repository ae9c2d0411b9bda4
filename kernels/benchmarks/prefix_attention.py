"""prefix_attention against attention over keys expanded to every row, and library forms.

Target: 2x faster than flash over expanded keys on CPU (MHA, prefix 630); on CUDA 75 % of the copy
bandwidth on unique bytes, 3x faster than SDPA over expanded keys and 1.5x than a paged call.
"""

import inspect
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rounds import Form, Size, copy_bandwidth, interleave, milliseconds, of_size, ratio
from stream_kernels import HostLayout, attention_with_lse, merge_by_lse, prefix_attention
from stream_kernels.forms import INTERPRETED, takes_triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Shape(NamedTuple):
    """k rows for each of G questions; suffix lengths are log-normal about their mean, or equal."""

    name: str
    groups: int
    rows_each: int
    heads: int
    kv_heads: int
    size: int
    prefix: int
    mean_suffix: int
    equal: bool = True


CPU_SHAPES = [
    Shape("mha-12x64", 1, 10, 12, 12, 64, 630, 75),
    Shape("mha-12x64", 4, 10, 12, 12, 64, 630, 75),
    Shape("mha-12x64-ragged", 16, 10, 12, 12, 64, 630, 75, False),
    Shape("mha-32x128", 1, 10, 32, 32, 128, 630, 75),
    Shape("mha-32x128", 4, 10, 32, 32, 128, 630, 75),
    Shape("gqa-12:2x64", 4, 10, 12, 2, 64, 630, 75),
    Shape("gqa-28:4x128", 4, 10, 28, 4, 128, 630, 75),
]
CUDA_SHAPES = [
    Shape("mha-32x128", 32, 10, 32, 32, 128, 640, 75, False),
    Shape("mha-32x128-few", 4, 10, 32, 32, 128, 640, 75, False),
    Shape("gqa-28:4x128", 32, 10, 28, 4, 128, 640, 75, False),
]
TINY = Shape("gqa-4:2x16", 2, 2, 4, 2, 16, 64, 5, False)


def measure(device: str, rounds: int, size: Size) -> Iterator[dict[str, object]]:
    """One row a shape."""
    shapes = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    on_card = takes_triton(torch.device(device))
    bandwidth = copy_bandwidth(device, 1 << (20 if size == "tiny" else 30)) if on_card else None
    for shape in of_size(shapes, TINY, size, quick=2):
        yield measure_shape(shape, device, rounds, bandwidth)


def measure_shape(
    shape: Shape, device: str, rounds: int, bandwidth: float | None
) -> dict[str, object]:
    """Times, ratios, unique bytes and error of one shape."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = Case(shape, device, dtype)
    forms: dict[str, Form] = {
        "prefix_attention": case.shared,
        "sdpa_expanded": case.expanded,
        "two_calls_and_merge": case.library,
    }
    if shape.heads != shape.kv_heads and device == "cpu":
        forms["repeat_kv"] = case.repeated
    if bandwidth is not None:
        forms |= case.varlen_forms()
    calls = 5 if device == "cuda" else max(1, 40 // (shape.groups * shape.rows_each))
    calls = 1 if INTERPRETED else calls
    times = interleave(forms, rounds=rounds, device=device, calls=calls)
    exact = case.exact(min(20, case.num_rows))
    row: dict[str, object] = {
        "shape": shape._asdict(),
        "mean_suffix": round(sum(case.lengths) / case.num_rows, 1),
        "faster_than": {
            name: ratio(times, name, "prefix_attention")
            for name in forms
            if name != "prefix_attention"
        },
        "unique_mib": round(case.unique_bytes / 2**20, 1),
        "max_error": {
            "prefix_attention": float((case.shared(0)[: len(exact)] - exact).abs().max()),
            "sdpa_expanded": float((case.expanded(0)[: len(exact)] - exact).abs().max()),
        },
        "milliseconds": milliseconds(times),
    }
    if bandwidth is not None:
        seconds = sorted(times["prefix_attention"])[rounds // 2]
        row["share_of_copy_bandwidth"] = round(case.unique_bytes / seconds / bandwidth, 3)
    return row


class Case:
    """The same keys in the two-part layout and expanded to every row."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        draw = random.Random(0)
        self.shape, self.device, self.scale = shape, device, shape.size**-0.5
        self.num_rows = shape.groups * shape.rows_each
        self.lengths = [
            shape.mean_suffix
            if shape.equal
            else min(
                2 * shape.mean_suffix, int(shape.mean_suffix * draw.lognormvariate(0, 0.5)) + 1
            )
            for _ in range(self.num_rows)
        ]
        self.longest = max(self.lengths)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device).to(dtype)

        heads, kv_heads, size = shape.heads, shape.kv_heads, shape.size
        self.query = normal(self.num_rows, heads, size)
        self.prefix = [normal(kv_heads, shape.groups * shape.prefix, size) for _ in range(2)]
        capacity = (self.longest + 15) // 16 * 16
        self.suffix = [normal(self.num_rows, kv_heads, capacity, size) for _ in range(2)]

        def int32(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        spans = [(group * shape.prefix, shape.prefix) for group in range(shape.groups)]
        rows = torch.arange(self.num_rows).view(shape.groups, shape.rows_each)
        self.host = HostLayout(spans, rows.tolist(), list(range(self.num_rows)), self.lengths)
        self.spans, self.groups = int32(spans), int32(rows.tolist())
        self.slots, self.device_lengths = int32(self.host.slots), int32(self.lengths)
        self.expanded_keys = [
            torch.cat([self._expand(prefix), suffix[:, :, : self.longest]], dim=2)
            for prefix, suffix in zip(self.prefix, self.suffix, strict=True)
        ]
        self.mask = None
        if min(self.lengths) < self.longest:
            places = torch.arange(shape.prefix + self.longest, device=device)
            seen = places < (self.device_lengths + shape.prefix)[:, None]
            self.mask = torch.zeros(seen.shape, dtype=dtype, device=device)
            self.mask = self.mask.masked_fill_(~seen, -torch.inf)[:, None, None]

    @property
    def unique_bytes(self) -> int:
        """Keys and values that must be read: each prefix once, each row's own suffix."""
        tokens = self.shape.groups * self.shape.prefix + sum(self.lengths)
        return 2 * tokens * self.shape.kv_heads * self.shape.size * self.query.element_size()

    def shared(self, call: int) -> Tensor:
        """Ours."""
        return prefix_attention(
            self.query,
            self.prefix[0],
            self.prefix[1],
            self.spans,
            self.groups,
            self.suffix[0],
            self.suffix[1],
            self.slots,
            self.device_lengths,
            scale=self.scale,
            host=self.host,
        )

    def expanded(self, call: int) -> Tensor:
        """torch's attention over a copy of the prefix for every row; GQA without repeating."""
        return scaled_dot_product_attention(
            self.query[:, :, None],
            self.expanded_keys[0],
            self.expanded_keys[1],
            attn_mask=self.mask,
            scale=self.scale,
            enable_gqa=self.shape.heads != self.shape.kv_heads,
        )[:, :, 0]

    def repeated(self, call: int) -> Tensor:
        """The same with every key head repeated, as models' eager code does."""
        repeats = self.shape.heads // self.shape.kv_heads
        key, value = (x.repeat_interleave(repeats, dim=1) for x in self.expanded_keys)
        return scaled_dot_product_attention(
            self.query[:, :, None], key, value, attn_mask=self.mask, scale=self.scale
        )[:, :, 0]

    def library(self, call: int) -> Tensor:
        """Two calls over all groups at once (their prefixes have one length here) and a merge."""
        shape = self.shape
        each = (shape.groups, shape.prefix)
        key, value = (x.unflatten(1, each).transpose(0, 1) for x in self.prefix)
        by_group = self.query.view(shape.groups, shape.rows_each, shape.kv_heads, -1, shape.size)
        packed = by_group.transpose(1, 2).reshape(shape.groups, shape.kv_heads, -1, shape.size)
        out, lse = attention_with_lse(packed, key, value, scale=self.scale)
        own_key, own_value = (x[:, :, : self.longest] for x in self.suffix)
        own_out, own_lse = attention_with_lse(
            self.query[:, :, None],
            own_key,
            own_value,
            scale=self.scale,
            key_lengths=None if self.mask is None else self.device_lengths,
        )
        split = (shape.groups, shape.kv_heads, shape.rows_each, -1)
        out = out.view(*split, shape.size).transpose(1, 2).reshape(self.query.shape)
        lse = lse.view(split).transpose(1, 2).reshape(self.query.shape[:2])
        return merge_by_lse(out, lse, own_out[:, :, 0], own_lse[:, :, 0])

    def varlen_forms(self) -> dict[str, Form]:
        """torch's paged flash attention over shared pages, where this torch and card have it."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return {}
        if "block_table" not in inspect.signature(varlen_attn).parameters:
            return {}
        form = self._paged(varlen_attn, page=64)  # prefixes fill their pages, so as to be shared
        try:
            form(0)
        except RuntimeError as error:
            print(f"paged attention refused: {error}", file=sys.stderr)
            return {}
        return {"varlen_paged": form}

    def _paged(self, varlen_attn: Any, page: int) -> Form:
        shape, pages = self.shape, self.shape.prefix // page
        own_pages = (self.longest + page - 1) // page
        prefix = [x.transpose(0, 1).unflatten(0, (-1, page)) for x in self.prefix]
        own = [
            torch.nn.functional.pad(x, (0, 0, 0, own_pages * page - x.shape[2]))
            .transpose(1, 2)
            .unflatten(1, (-1, page))
            .flatten(0, 1)
            for x in self.suffix
        ]
        key, value = (torch.cat(both).contiguous() for both in zip(prefix, own, strict=True))
        rows = torch.arange(self.num_rows, device=self.device)
        table = torch.cat(
            [
                (rows // shape.rows_each)[:, None] * pages
                + torch.arange(pages, device=self.device),
                shape.groups * pages
                + rows[:, None] * own_pages
                + torch.arange(own_pages, device=self.device),
            ],
            dim=1,
        ).int()
        starts = torch.arange(self.num_rows + 1, device=self.device, dtype=torch.int32)
        used = (self.device_lengths + shape.prefix).int()
        return lambda call: varlen_attn(
            self.query,
            key,
            value,
            starts,
            None,
            1,
            shape.prefix + self.longest,
            scale=self.scale,
            enable_gqa=shape.heads != shape.kv_heads,
            seqused_k=used,
            block_table=table,
        )

    def exact(self, num_rows: int) -> Tensor:
        """float64 over the expanded keys of the first rows."""
        repeats = self.shape.heads // self.shape.kv_heads
        key, value = (
            x[:num_rows].double().repeat_interleave(repeats, dim=1) for x in self.expanded_keys
        )
        mask = None if self.mask is None else self.mask[:num_rows].double()
        query = self.query[:num_rows, :, None].double()
        scores = query @ key.transpose(2, 3) * self.scale
        scores = scores if mask is None else scores + mask
        return (torch.softmax(scores, dim=-1) @ value)[:, :, 0]

    def _expand(self, prefix: Tensor) -> Tensor:
        """[Hkv, T, D] to [R, Hkv, P, D]."""
        each = prefix.unflatten(1, (self.shape.groups, self.shape.prefix)).transpose(0, 1)
        return each.repeat_interleave(self.shape.rows_each, dim=0)
