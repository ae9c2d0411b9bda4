"""What the engine is measured against, written from descriptions of how others do it.

ancestor   k copies of prompt and image through generate(); every answer scored alone, twice
           (as "chosen" and as "rejected"), with full-vocabulary logits of all positions
nrs        generate(num_return_sequences=k); the k whole sequences scored in one batch
nrs_best   nrs in its best configuration: static cache, logits only where they are needed, and
           (the caller's part) the same fast linear layers that the engine uses
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stream_engine.models.base import IMAGE_SLOT, Prompt


def model_inputs(hf: PreTrainedModel, prompt: Prompt, copies: int = 1) -> dict[str, Tensor]:
    """The prompt as transformers' Llava takes it, `copies` times."""
    image_id = hf.config.image_token_id
    ids = [image_id if token == IMAGE_SLOT else token for token in prompt.ids]
    input_ids = torch.tensor([ids] * copies, device=hf.device)
    pixels = torch.stack([prompt.vision[0]] * copies).to(hf.device, hf.dtype)
    return {
        "input_ids": input_ids,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(input_ids),
    }


def sampling(answer_tokens: int) -> dict[str, Any]:
    return {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": answer_tokens,
        "min_new_tokens": answer_tokens,
        "pad_token_id": 0,
    }


@torch.no_grad()
def ancestor_generate(hf: PreTrainedModel, prompt: Prompt, k: int, answer_tokens: int) -> Tensor:
    out = hf.generate(**model_inputs(hf, prompt, k), **sampling(answer_tokens))
    return _without_image_ids(hf, out[:, -answer_tokens:])


@torch.no_grad()
def nrs_generate(
    hf: PreTrainedModel, prompt: Prompt, k: int, answer_tokens: int, *, static: bool = False
) -> Tensor:
    extra = {"cache_implementation": "static"} if static else {}
    out = hf.generate(
        **model_inputs(hf, prompt), num_return_sequences=k, **sampling(answer_tokens), **extra
    )
    return _without_image_ids(hf, out[:, -answer_tokens:])


def _without_image_ids(hf: PreTrainedModel, answers: Tensor) -> Tensor:
    """A random model draws the image placeholder now and then, which scoring cannot take."""
    return answers.masked_fill(answers == hf.config.image_token_id, 3)


@torch.no_grad()
def ancestor_score(hf: PreTrainedModel, prompt: Prompt, answers: Tensor) -> list[Tensor]:
    """Batch size 1, each answer twice, logits and log_softmax at every position."""
    scores = []
    for answer in answers:
        for _ in ("chosen", "rejected"):
            inputs = model_inputs(hf, prompt)
            ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
            logits = hf(
                input_ids=ids,
                pixel_values=inputs["pixel_values"],
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            ).logits.float()
            logps = torch.log_softmax(logits[:, :-1], dim=-1)
            token_logps = logps.gather(2, ids[:, 1:, None])[0, :, 0]
        scores.append(token_logps[-len(answer) :])
    return scores


@torch.no_grad()
def batched_score(
    hf: PreTrainedModel, prompt: Prompt, answers: Tensor, *, keep: bool = True
) -> Tensor:
    """All k whole sequences in one batch; with `keep`, logits of the answers' positions only."""
    inputs = model_inputs(hf, prompt, len(answers))
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    length = answers.shape[1]
    logits = hf(
        input_ids=ids,
        pixel_values=inputs["pixel_values"],
        attention_mask=torch.ones_like(ids),
        use_cache=False,
        logits_to_keep=length + 1 if keep else 0,
    ).logits
    logps = torch.log_softmax(logits[:, -length - 1 : -1].float(), dim=-1)
    return logps.gather(2, answers[..., None])[..., 0]
