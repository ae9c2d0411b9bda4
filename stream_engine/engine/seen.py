"""The tokens that answers hold already: what a repetition penalty falls on.

Legend: R rows, V columns of the head, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stream_engine.engine.prefix_cache import KVCache


class SeenTokens:
    """The tokens of the answer in each slot, kept on the device from step to step: bool [S, V].

    A captured step notes its tokens itself, so that nothing is copied from the host.
    """

    def __init__(self, cache: KVCache, vocab_size: int, device: torch.device) -> None:
        self.cache = cache
        self.marks = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._true = torch.ones((), dtype=torch.bool, device=device)

    def begin(self, slots: Sequence[int]) -> None:
        """New answers take these slots. The marks grow with the cache's slots."""
        if len(self.marks) < self.cache.num_slots:
            larger = self.marks.new_zeros(self.cache.num_slots, self.marks.shape[1])
            larger[: len(self.marks)] = self.marks
            self.marks = larger
        self.marks[torch.tensor(slots, device=self.marks.device)] = False

    def note(self, slots: Tensor, tokens: Tensor) -> None:
        """Each slot's answer has got this token: int64 [R] both."""
        self.marks.index_put_((slots, tokens), self._true)

    def of(self, slots: Tensor) -> Tensor:
        """The marks of these slots, [R, V]."""
        return self.marks[slots]

    def after(self, slots: Sequence[int], last: Sequence[Sequence[int]]) -> Tensor:
        """The marks of these slots [R, V], once the last token of each, if it has one, is noted."""
        device = self.marks.device
        fed = [(slot, token) for slot, tokens in zip(slots, last) for token in tokens]
        if fed:
            self.note(*torch.tensor(fed, device=device).T)
        return self.of(torch.tensor(slots, device=device))
