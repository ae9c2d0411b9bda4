"""A decoder layer for one new token a row, in one call: what is beside this file, in its order.

What it computes is, bit by bit, what the functions of these files compute one after the other; time
is saved where a layer's own work takes little more than as many calls of Python.
Legend: R rows, D hidden, H and K query and key heads, S head size, I inner size.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stream_kernels.cpu import (
    compiled,
    decode_attention,
    layer_steps,
    panel_product,
    tile_product,
)


class Call(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Calls(ctypes.Structure):
    """As the C file has it."""

    _fields_ = (("calls", ctypes.POINTER(Call)), ("count", ctypes.c_int64))


class Sizes(NamedTuple):
    """Of a layer."""

    heads: int  # H
    kv_heads: int  # K
    head_size: int  # S
    inner: int  # I


class Weights(NamedTuple):
    """Of a layer: two norms [D], and of query, key, value, output, gate, up and down, [V, D] each,
    weights as `panel_product` or `tile_product` reads them and biases [V] where there are any."""

    norms: Sequence[Tensor]
    epsilons: Sequence[float]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]


class Slabs(NamedTuple):
    """Of a layer's cache: see `prefix_attention`."""

    prefix_key: Tensor
    prefix_value: Tensor
    suffix_key: Tensor
    suffix_value: Tensor


@cache
def _function() -> Any:
    """The C function, or None where it cannot be had."""
    return compiled.function("make_calls", Calls)


def serves(dtype: torch.dtype, head_size: int, weights: Sequence[Tensor]) -> bool:
    """Whether `DecodeLayers` takes a layer with these weights: all are read by one of the two."""
    return _serves_heads(dtype, head_size) and (
        all(map(panel_product.reads, weights)) or all(map(tile_product.takes, weights))
    )


@cache
def _serves_heads(dtype: torch.dtype, size: int) -> bool:
    if _function() is None or not layer_steps.serves(dtype):
        return False
    query = torch.empty(1, 1, size, dtype=dtype)
    return decode_attention.serves(query, (query, query), (query[None], query[None]))


class DecodeLayers:
    """The layers of one step, which share buffers: `run` each in turn."""

    def __init__(
        self,
        x: Tensor,
        sizes: Sizes,
        tables: tuple[Tensor, Tensor],
        layout: Sequence[Tensor],
        *,
        in_panels: bool,
    ) -> None:
        """x [R, D] is one like those that `run` takes; cosines and sines [R, S]; `layout` as
        `decode_attention` takes it. `in_panels`: the weights are packed."""
        heads, kv_heads, size, inner = sizes
        rows, hidden = x.shape
        self.normed, self.middle = torch.empty(2, rows, hidden, dtype=x.dtype)
        self.query, self.attended = torch.empty(2, rows, heads, size, dtype=x.dtype)
        self.key, self.value = torch.empty(2, rows, kv_heads, size, dtype=x.dtype)
        self.gate, self.up, self.active = torch.empty(3, rows, inner, dtype=x.dtype)
        self.tables, self.layout = [each.contiguous() for each in tables], layout
        products = _InPanels if in_panels else _InTiles
        self.first = products(self.normed, (self.query, self.key, self.value))
        self.output = products(self.attended, (self.middle,))
        self.second = products(self.normed, (self.gate, self.up))
        self.down = products(self.active, (self.middle,))
        self.norms = [self._step(each, self.normed) for each in (x, self.middle)]
        self.rotation = self._rotation()
        self.gating = self._step(self.gate, self.active)
        self.gating.y = self.up.data_ptr()
        self.attention = decode_attention.Arguments()
        self.calls = _calls(
            ("rms_norm", self.norms[0]),
            *self.first.calls,
            ("rotary", self.rotation),
            ("decode_attention", self.attention),
            *self.output.calls,
            ("rms_norm", self.norms[1]),
            *self.second.calls,
            ("silu_and_multiply", self.gating),
            *self.down.calls,
        )

    def _step(self, x: Tensor, out: Tensor) -> layer_steps.Layer:
        return layer_steps.Layer(
            x=x.data_ptr(),
            out=out.data_ptr(),
            rows=out.shape[0],
            size=out.shape[1],
            is_bfloat16=out.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
        )

    def _rotation(self) -> layer_steps.Layer:
        rows, heads, size = self.query.shape
        return layer_steps.Layer(
            *(each.data_ptr() for each in (*self.tables, self.query, self.key)),
            rows=rows,
            size=size,
            heads=heads,
            more_heads=self.key.shape[1],
            out_stride=self.query.stride(0),
            more_stride=self.key.stride(0),
            table_stride=size,
            is_bfloat16=self.query.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
        )

    def run(self, x: Tensor, layer: Weights, slabs: Slabs, scale: float) -> Tensor:
        """What the layer makes of x [R, D], dense: [R, D]. The new keys and values are in the
        slabs then."""
        assert x.is_contiguous() and x.shape == self.middle.shape, f"{x.shape}"
        out = torch.empty_like(x)
        self.norms[0].x = x.data_ptr()
        for step, weight, epsilon in zip(self.norms, layer.norms, layer.epsilons, strict=True):
            step.y, step.epsilon = weight.data_ptr(), epsilon
        weights, biases = layer.weights, layer.biases
        self.first.read(weights[:3], biases[:3])
        self.output.read(weights[3:4], biases[3:4], to=x)
        self.second.read(weights[4:6], biases[4:6])
        self.down.read(weights[6:], biases[6:], to=self.middle, out=out)
        new = self.key, self.value
        prefix, suffix = slabs[:2], slabs[2:]
        decode_attention.fill(
            self.attention, self.query, prefix, suffix, self.layout, new, self.attended, scale
        )
        if not _function()(ctypes.byref(self.calls), compiled.parallel()):
            raise MemoryError("no memory for a product's tiles")
        return out


def _calls(*steps: tuple[str, ctypes.Structure]) -> Calls:
    library = compiled.library()
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name, _ in steps]
    calls = [Call(at, ctypes.addressof(step)) for at, (_, step) in zip(addresses, steps)]
    return Calls((Call * len(calls))(*calls), len(calls))


class _Products(ABC):
    """Products of one x: `calls` make them with the weights that were read last."""

    products: Sequence[Any]
    calls: Sequence[tuple[str, ctypes.Structure]]

    @abstractmethod
    def address(self, weight: Tensor) -> int:
        """Where a weight lies."""

    def read(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        to: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        """Take a layer's weights; what is added to, and where the sum goes, if they are others."""
        for product, weight, bias in zip(self.products, weights, biases, strict=True):
            assert weight.shape[0] == product.columns, f"{weight.shape}"
            product.weight = self.address(weight)
            product.bias = None if bias is None else bias.data_ptr()
            product.to = None if to is None else to.data_ptr()
            if out is not None:
                product.out = out.data_ptr()


class _InPanels(_Products):
    """Of packed weights, in one call."""

    def __init__(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        numbers = panel_product.numbers(x.flatten(1), x.dtype)
        self.all = panel_product.Products(x=x.data_ptr(), num_products=len(outs), **numbers)
        self.products = [self.all.products[i] for i in range(len(outs))]
        for product, out in zip(self.products, outs):
            product.out, product.columns = out.data_ptr(), out[0].numel()
        self.calls = [("panel_products", self.all)]

    def address(self, weight: Tensor) -> int:
        assert weight.shape[1] == self.all.size, f"{weight.shape}"
        return panel_product.address(weight)


class _InTiles(_Products):
    """Of bfloat16 weights as they lie, a call each."""

    def __init__(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        self.size = x[0].numel()
        self.products = [
            tile_product.Product(
                x=x.data_ptr(),
                out=out.data_ptr(),
                rows=len(x),
                columns=out[0].numel(),
                size=self.size,
                is_bfloat16=1,
                num_threads=torch.get_num_threads(),
            )
            for out in outs
        ]
        self.calls = [("tile_product", product) for product in self.products]

    def address(self, weight: Tensor) -> int:
        assert weight.shape[1] == self.size, f"{weight.shape}"
        return weight.data_ptr()
