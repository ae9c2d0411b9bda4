"""CPU execution: linear layers through oneDNN where that is this processor's fastest GEMM."""

from __future__ import annotations

import torch
from stream_kernels.gemm import linear, onednn_pays, pack
from torch import Tensor, nn


class OneDNNLinear(nn.Linear):
    """An nn.Linear whose weight lies in oneDNN's blocked layout: for inference only."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def pack_linears(module: nn.Module, *, keep: nn.Module | None = None) -> int:
    """Turn every plain float32 nn.Linear inside `module` into a OneDNNLinear, in place.

    The packed weight takes the old one's place, so memory stays the same; it can no longer be
    indexed or saved. `keep` is left alone (a head whose rows are read). Returns how many layers
    were turned: 0 where oneDNN does not pay.
    """
    if not onednn_pays():
        return 0
    count = 0
    for layer in module.modules():
        if type(layer) is nn.Linear and layer is not keep and layer.weight.dtype == torch.float32:
            layer.weight = nn.Parameter(pack(layer.weight.detach()), requires_grad=False)
            layer.__class__ = OneDNNLinear
            count += 1
    return count
