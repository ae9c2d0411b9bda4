"""One token a row from its logits, under the engine's sampling.

Legend: R rows, V columns of the head, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from stream_kernels import sample, uniforms
from torch import Tensor

if TYPE_CHECKING:
    from stream_engine.engine.engine import Engine
    from stream_engine.engine.prefix_cache import KVCache


def draw(
    engine: Engine, logits: Tensor, seeds: Tensor, counts: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens and their untempered log-probs: (int64 [R], float32 [R]).

    `seeds` and `counts` (tokens drawn so far) are int64 [R]; `seen` [R, V] marks the tokens that a
    repetition penalty falls on, and is None where there is no penalty.
    """
    sampling = engine.sampling
    return sample(
        logits,
        uniforms(seeds, counts),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        suppress=engine.suppressed,
        vocab_size=engine.model.vocab_size,
        penalized=None if seen is None else penalize(logits, seen, sampling.repetition_penalty),
    )


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [R, V] after a repetition penalty on the tokens that `seen` [R, V] marks.

    Keskar et al. 2019 (CTRL), as transformers applies it when it is given embeddings: the
    prompt's tokens do not count. Positive logits are divided by the penalty, others multiplied.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_in(answers: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """The tokens of each row's answer, as `penalize` takes them: bool, as large as `logits`."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    rows = [row for row, tokens in enumerate(answers) for _ in tokens]
    columns = [token for tokens in answers for token in tokens]
    seen[rows, columns] = True
    return seen


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
