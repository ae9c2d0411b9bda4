"""Any vision-language model that transformers supports natively, with its own processor.

The model's own code places the image features and computes positions (M-RoPE ...): `prefill` runs
the wrapper once per prompt, and the engine's attention is reached through the language model's
configuration alone, so that towers keep theirs. What a wrapper does to its logits is read from the
configuration and checked against its own forward at load; what cannot be reproduced is refused by
name rather than scored wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models.base import Prompt, VisionLanguageModel, cache_argument
from stream_engine.models.intact import read_json
from stream_engine.models.native import (
    QUESTION,
    adopt_own_logits,
    check_template,
    end_token_ids,
    has_shareable_layers,
    load_native,
)
from stream_engine.models.processors import load_processor
from stream_engine.records import prompt_parts

# Their language model looks at the image by other means than positions of its own sequence, is not
# causal over the prompt, or is not apart from the whole.
UNSUPPORTED = {
    "blip": "cross-attention",
    "florence2": "an encoder-decoder",
    "git": "no separate language model",
    "idefics": "cross-attention",
    "kosmos-2": "no separate language model",
    "mllama": "cross-attention",
    "paligemma": "a prompt that is read in both directions",
    "pix2struct": "an encoder-decoder",
    "pp_formulanet": "an encoder-decoder",
    "t5gemma2": "an encoder-decoder",
    "udop": "an encoder-decoder",
    "vision-encoder-decoder": "an encoder-decoder",
    "diffusion_gemma": "no autoregressive language model",
    "pi0": "no text output",
    "evolla": "no pictures",
    "instructblipvideo": "no pictures",
}

# Image tokens of these see each other in both directions, which no causal prefill gives.
BIDIRECTIONAL_IMAGES = {
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "molmo2",
    "shieldgemma2",
}

IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def matches(config: dict[str, Any]) -> bool:
    """A class of transformers' image-text-to-text mapping, and not a marked foreign format."""
    names: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.get("model_type", ""))
    known = names if isinstance(names, tuple) else (names,)
    return any(name in known for name in config.get("architectures") or [])


def load(checkpoint: Path, config: ModelConfig) -> HfVlm:
    """Load the model and its processor; see `models.Family`."""
    stated = read_json(checkpoint / "config.json")
    model_type = stated["model_type"]
    if model_type in UNSUPPORTED:
        raise CheckpointError(
            f"{checkpoint} is {model_type}, which has {UNSUPPORTED[model_type]}; not supported"
        )
    processor = load_processor(checkpoint, model_type)
    wrapper = load_native(AutoModelForImageTextToText, checkpoint, config)
    model = HfVlm(checkpoint, wrapper, processor)
    adopt_own_logits(model, wrapper)
    return model


class HfVlm(VisionLanguageModel):
    """A loaded checkpoint of a native architecture."""

    family = "hf_vlm"

    def __init__(self, checkpoint: Path, wrapper: PreTrainedModel, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.wrapper = wrapper
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.core: Any = wrapper.base_model
        self.backbone: Any = wrapper.get_decoder()
        self.lm_head = wrapper.get_output_embeddings()
        if self.backbone is self.core or self.lm_head is None:
            raise CheckpointError(
                f"{checkpoint}: {type(wrapper).__name__} has no separate language model and head"
            )
        if not getattr(processor, "chat_template", None):
            raise CheckpointError(f"{checkpoint} has no chat template; add chat_template.jinja")
        text = wrapper.config.get_text_config()
        self.vocab_size = self.lm_head.weight.shape[0]
        self.own_attention = self.backbone.config._attn_implementation
        self.generation_defaults = read_json(checkpoint / "generation_config.json")
        self.stop_token_ids = end_token_ids(self.tokenizer, text)
        self.shares_prefix = _is_causal(wrapper.config)
        placeholders = {
            getattr(wrapper.config, field)
            for field in IMAGE_TOKEN_FIELDS
            if isinstance(getattr(wrapper.config, field, None), int)
        }
        self.suppressed_token_ids = tuple(sorted(i for i in placeholders if i < self.vocab_size))
        marks = self.tokenizer.convert_ids_to_tokens(list(placeholders))
        own = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
        self._marks = {mark for mark in [*marks, *own] if isinstance(mark, str)}
        check_template(checkpoint, self._rendered([{"type": "text", "text": QUESTION}]))
        self.places_images = self._keeps_order()
        self.turn_marks = self._template_words()

    def control_texts(self) -> set[str]:
        return super().control_texts() | self._marks

    def closing_ids(self) -> list[int]:
        parts = [{"type": "text", "text": word} for word in (QUESTION, "THE ANSWER")]
        turns = [{"role": w, "content": [p]} for w, p in zip(("user", "assistant"), parts)]
        try:
            text = self.processor.apply_chat_template(turns, tokenize=False)
        except (ValueError, TypeError, KeyError, TemplateError):  # it knows no answers
            return []
        return self.encode_text(text.partition("THE ANSWER")[2])

    def _rendered(self, content: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _keeps_order(self) -> bool:
        """Whether the chat template puts a picture between two texts where it stands."""
        before, after = ({"type": "text", "text": word} for word in ("BEFORE", "AFTER"))
        text = self._rendered([before, {"type": "image"}, after])
        start, end = text.find("BEFORE"), text.find("AFTER")
        return 0 <= start < end and bool(text[start + len("BEFORE") : end].strip())

    def _template_words(self) -> tuple[str, ...]:
        """The template's words in front of a user's text and of the answer, if they are plain."""
        text = self._rendered([{"type": "text", "text": QUESTION}])
        head, found, tail = text.partition(QUESTION)
        words = [*head.split()[-1:], *tail.split()[-1:]] if found else []
        return tuple(word for word in words if word.endswith(":"))

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        following = iter(images)
        content: list[dict[str, Any]] = [
            {"type": "image", "image": next(following).convert("RGB")}
            if text is None
            else {"type": "text", "text": text}
            for text in prompt_parts(question, len(images))
        ]
        try:
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise RecordError("unprocessable_image", str(error).splitlines()[0]) from error
        ids = inputs.pop("input_ids")[0].tolist()
        vision = {k: v for k, v in inputs.items() if k != "attention_mask"}
        seen = [vision[k] for k in sorted(vision) if isinstance(vision[k], Tensor)]
        return Prompt(ids=ids, digest=self.digest(ids, seen), vision=vision)

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Nothing: the wrapper encodes the images while it prefills."""
        return [None] * len(prompts)

    def prefill(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> Tensor:
        return torch.stack([self.run_prompt(prompt) for prompt in prompts])

    def prefill_cached(self, prompt: Prompt, features: Tensor | None, cache: Any) -> Tensor:
        name = cache_argument(type(self.core))
        return self.run_prompt(prompt, use_cache=True, **{name: cache})

    def run_prompt(self, prompt: Prompt, **options: Any) -> Tensor:
        """One prompt through the wrapper: the last hidden state [D]; sets `next_position`."""
        ids = torch.tensor([prompt.ids], device=self.device)
        vision = {name: self._move(value) for name, value in prompt.vision.items()}
        for name in vision:
            if name.endswith("token_type_ids"):  # a prompt may be cut to what several share
                vision[name] = vision[name][:, : len(prompt.ids)]
        has_deltas = hasattr(self.core, "rope_deltas")
        if has_deltas:
            self.core.rope_deltas = None  # an earlier prompt's would be taken for this one's
        options.setdefault("use_cache", False)
        output = self.core(input_ids=ids, **vision, **options)
        delta = self.core.rope_deltas if has_deltas else None
        prompt.next_position = len(prompt.ids) + (0 if delta is None else int(delta))
        return output.last_hidden_state[0, -1]

    def _move(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


def _is_causal(config: PreTrainedConfig) -> bool:
    """Whether every layer is causal attention with keys and values of its own, images included."""
    text = config.get_text_config()
    bidirectional = config.model_type in BIDIRECTIONAL_IMAGES
    borrows = getattr(text, "num_kv_shared_layers", 0)
    return has_shareable_layers(text) and not bidirectional and not borrows
