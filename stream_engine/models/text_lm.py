"""Plain causal language models (fact splitters, question writers): the chat template is their own.

Any native `*ForCausalLM` of transformers. Pictures are refused record by record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.models.intact import read_json
from stream_engine.models.native import (
    QUESTION,
    adopt_own_logits,
    check_template,
    end_token_ids,
    has_shareable_layers,
    load_native,
    load_tokenizer,
)

END_OF_TURN = "<|eot_id|>"
"""Llama 3 ends an answer with it, whatever its config.json says."""


def matches(config: dict[str, Any]) -> bool:
    """A class of transformers' causal language model mapping."""
    names: Any = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).get(config.get("model_type", ""))
    known = names if isinstance(names, tuple) else (names,)
    return any(name in known for name in config.get("architectures") or [])


def load(checkpoint: Path, config: ModelConfig) -> TextModel:
    """Load strictly; see `models.Family`."""
    tokenizer = load_tokenizer(checkpoint)
    if not tokenizer.chat_template:
        raise CheckpointError(f"{checkpoint} has no chat template; add chat_template.jinja")
    lm = load_native(AutoModelForCausalLM, checkpoint, config)
    model = TextModel(checkpoint, lm, tokenizer)
    check_template(checkpoint, model.rendered(QUESTION))
    adopt_own_logits(model, lm)
    return model


class TextModel(VisionLanguageModel):
    """A loaded text model: `images` must be empty."""

    family = "text_lm"

    def __init__(self, checkpoint: Path, lm: PreTrainedModel, tokenizer: Any) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.backbone = lm.get_decoder()
        self.lm_head = lm.get_output_embeddings()
        self.own_attention = lm.config._attn_implementation
        self.vocab_size = self.lm_head.weight.shape[0]
        self.generation_defaults = read_json(checkpoint / "generation_config.json")
        stops = end_token_ids(tokenizer, lm.config)
        if (turn := tokenizer.get_vocab().get(END_OF_TURN)) is not None:
            stops |= {turn}
        self.stop_token_ids = stops
        self.shares_prefix = has_shareable_layers(lm.config)

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        if images:
            raise RecordError("images_not_supported", f"{self.checkpoint.name} is a text model")
        ids = self.encode_text(self.rendered(question))  # with the template's special tokens
        return Prompt(ids=ids, digest=self.digest(ids, None))

    def rendered(self, question: str) -> str:
        """The question in the checkpoint's chat template."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        return [None] * len(prompts)
