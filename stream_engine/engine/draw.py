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
    from stream_engine.engine.runner import ModelRunner


def draw(
    runner: ModelRunner, logits: Tensor, seeds: Tensor, counts: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens and their untempered log-probs: (int64 [R], float32 [R]).

    `seeds` and `counts` (tokens drawn so far) are int64 [R]; `seen` [R, V] marks the tokens that a
    repetition penalty falls on, and is None where there is no penalty.
    """
    sampling = runner.sampling
    return sample(
        logits,
        uniforms(seeds, counts),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        suppress=runner.suppressed,
        vocab_size=runner.model.vocab_size,
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
