"""What tests of every family need: teacher-forced logits and greedy decoding, one sequence at once.

Only the base class's calls are used, with the family's own sdpa attention and no cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stream_engine.models.base import Prompt, VisionLanguageModel


@torch.no_grad()
def sequence_logits(
    model: VisionLanguageModel, prompt: Prompt, features: Tensor | None, token_ids: list[int]
) -> Tensor:
    """Logits [len(prompt) + len(token_ids), V] of a full forward over prompt and tokens."""
    tokens = torch.tensor(token_ids, dtype=torch.long)
    embeds = torch.cat([model.assemble(prompt, features), model.embed(tokens)])
    hidden = model.forward(embeds, torch.arange(len(embeds)))
    return model.lm_head(hidden)[:, : model.vocab_size]


def answer_logits(
    model: VisionLanguageModel, prompt: Prompt, features: Tensor | None, token_ids: list[int]
) -> Tensor:
    """Logits [len(token_ids), V] that predict each of the tokens."""
    return sequence_logits(model, prompt, features, token_ids[:-1])[len(prompt) - 1 :]


def token_logps(logits: Tensor, token_ids: list[int]) -> Tensor:
    """Log-probs [T] of tokens under logits [T, V]."""
    targets = torch.tensor(token_ids)[:, None]
    return logits.float().log_softmax(-1).gather(1, targets)[:, 0]


def greedy(
    model: VisionLanguageModel, prompt: Prompt, features: Tensor | None, num_tokens: int
) -> list[int]:
    """The likeliest tokens one after the other, each by a full forward."""
    token_ids: list[int] = []
    for _ in range(num_tokens):
        logits = sequence_logits(model, prompt, features, token_ids)[-1]
        token_ids.append(int(logits.argmax()))
    return token_ids
