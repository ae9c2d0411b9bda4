"""What the engine is measured against, written from descriptions of how others do it.

ancestor   k copies of prompt and image through generate(); every answer scored alone, twice
           (as "chosen" and as "rejected"), with full-vocabulary logits of all positions
nrs        generate(num_return_sequences=k); the k whole sequences scored in one batch
nrs_best   nrs in its best configuration: static cache, logits only where they are needed, and
           (the caller's part) the same fast linear layers that the engine uses
continuous transformers' continuous batching of the text model: paged cache, one prefill a
           question, rows forked from it; the image features are embeddings of virtual token ids
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from stream_engine.models.base import IMAGE_SLOT, Prompt

PAGE_SIZE = "page_size"
if PAGE_SIZE not in signature(ContinuousBatchingConfig).parameters:
    PAGE_SIZE = "block_size"  # its name in transformers 5.17
RETURNS_ALL_ROWS = PAGE_SIZE == "page_size"
"""Whether `generate_batch` returns every answer to a question; 5.17 draws all and returns one."""
BASELINES = ("ancestor", "nrs", "nrs_best", "continuous")


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


class Continuous:
    """`generate_batch` of transformers over the language model of a Llava.

    It takes token ids only: ids from the vocabulary's size on index a table of image features. Its
    log-probs are of the tempered distribution, so scoring is left to `batched_score`.
    """

    PAGE = 64

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf = hf
        with torch.device("meta"):  # a config of its own: models that share one spoil each other's
            self.text = LlamaForCausalLM(copy.deepcopy(hf.config.text_config)).eval()
        self.text.model = hf.model.language_model
        self.text.lm_head = hf.lm_head
        self.text.set_attn_implementation("sdpa")
        self.language_model_tokens = 0
        """Of the last call."""

    @torch.no_grad()  # inference_mode would forbid the cache's updates in place
    def generate(
        self,
        prompts: Sequence[Prompt],
        k: int,
        answer_tokens: int,
        *,
        return_logprobs: bool = False,
        **own: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Answers [P * k, T] and, if asked for, their log-probs under the tempered distribution.

        Raises:
            RuntimeError: when an answer fails or is missing.
        """
        vocab = self.hf.config.text_config.vocab_size
        virtual = count(vocab)  # every image has ids of its own: prefixes are shared by id
        ids = [
            [next(virtual) if token == IMAGE_SLOT else token for token in prompt.ids]
            for prompt in prompts
        ]
        settings = sampling(answer_tokens) | {"num_return_sequences": k, "eos_token_id": -1} | own
        settings.pop("min_new_tokens")  # no token ends an answer
        pages = sum(-(-len(row) // self.PAGE) for row in ids)
        pages += len(ids) * k * (2 - (-answer_tokens // self.PAGE))
        paged = ContinuousBatchingConfig(
            **{PAGE_SIZE: self.PAGE},
            num_blocks=2 * pages,
            max_batch_tokens=2048,
            return_logprobs=return_logprobs,
        )
        pixels = torch.stack([prompt.vision[0] for prompt in prompts])
        pixels = pixels.to(self.hf.device, self.hf.dtype)
        features = torch.cat(list(self.hf.model.get_image_features(pixels).pooler_output))
        with self._image_features(features, vocab):
            done = self.text.generate_batch(
                ids,
                generation_config=GenerationConfig(**settings),
                continuous_batching_config=paged,
            )
        rows = [row.generated_tokens for row in done.values() if row.error is None]
        if [len(row) for row in rows] != [answer_tokens] * (len(ids) * k):
            raise RuntimeError(
                f"continuous batching finished {len(rows)} of {len(ids) * k} answers"
            )
        answers = torch.tensor(rows, device=self.hf.device)
        logps = torch.tensor([row.logprobs for row in done.values()]) if return_logprobs else None
        return _without_image_ids(self.hf, answers), logps

    @contextmanager
    def _image_features(self, features: Tensor, vocab: int) -> Iterator[None]:
        """Let ids from `vocab` on mean the features [I, D], and count what passes through."""
        embed = self.text.model.embed_tokens
        own_forward = embed.forward

        def forward(ids: Tensor) -> Tensor:
            self.language_model_tokens += ids.numel()
            image = features[(ids - vocab).clamp(min=0)]
            return torch.where(
                ids[..., None] >= vocab, image, own_forward(ids.clamp(max=vocab - 1))
            )

        self.language_model_tokens = 0
        embed.forward = forward
        try:
            yield
        finally:
            del embed.forward


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
