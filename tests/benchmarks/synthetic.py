"""Random vision-language models of stated shapes, and their questions: nothing is read from disk.

One transformers model serves both sides of a comparison: the baselines drive its own classes, the
engine drives its language model, tower and projector through `SyntheticVLM`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from stream_engine.models.base import IMAGE_SLOT, Prompt, VisionLanguageModel
from stream_engine.records import PromptDigest

PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
"""CLIP's."""


@dataclass(frozen=True)
class Shape:
    """A LLaVA-like model: CLIP tower, projector, Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000
    vision_hidden: int = 256
    vision_layers: int = 4
    vision_heads: int = 4
    image: int = 336
    patch: int = 14

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2


SHAPES = {
    "tiny": Shape(64, 2, 4, 4, 128, vocab=512, vision_hidden=32, vision_layers=2, image=56),
    "S": Shape(256, 4, 4, 4, 688),
    "L": Shape(768, 8, 12, 12, 2048),
    "G": Shape(768, 8, 12, 2, 2048),
    "llava-7b": Shape(4096, 32, 32, 32, 11008, 32000, 1024, 24, 16),
    # Qwen2.5-VL-7B's language model behind the same tower (its own tower has 676 M parameters).
    "qwen-7b": Shape(3584, 28, 28, 4, 18944, 152064, 1024, 24, 16),
}


def build_llava(
    shape: Shape, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random LlavaForConditionalGeneration; the image token is the last id of the vocabulary."""
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        head_dim=shape.hidden // shape.heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=shape.vocab - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(default)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


class SyntheticVLM(VisionLanguageModel):
    """The engine's view of `build_llava`. No token ends an answer; lengths are what is asked."""

    family = "synthetic"

    def __init__(self, hf: PreTrainedModel, shape: Shape) -> None:
        self.hf = hf
        self.shape = shape
        self.checkpoint = Path("random")
        self.backbone = hf.model.language_model
        self.lm_head = hf.lm_head
        self.vocab_size = shape.vocab
        self.stop_token_ids = frozenset()
        self.suppressed_token_ids = (shape.vocab - 1,)
        self.generation_defaults = {}

    def prompt(self, question: str, images: Sequence[Image]) -> Prompt:
        """The ordinary prompt by which an engine plans; there is no tokenizer to ask."""
        return self.question(0)

    def question(self, number: int, num_tokens: int = 630) -> Prompt:
        """Prompt number `number`: a picture of noise, random text around the image's tokens."""
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(3, self.vocab_size - 1, (num_tokens,), generator=generator).tolist()
        before = 35
        image = self.shape.image_tokens
        ids = text[:before] + [IMAGE_SLOT] * image + text[before + image :]
        size = (3, self.shape.image, self.shape.image)
        values = torch.randint(0, 256, size, generator=generator) / 255
        pixels = (values - PIXEL_MEAN[:, None, None]) / PIXEL_STD[:, None, None]
        return Prompt(ids, PromptDigest(str(number), "", ""), vision=[pixels])

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        pixels = torch.stack([prompt.vision[0] for prompt in prompts]).to(self.device, self.dtype)
        hidden = self.hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return list(self.hf.model.multi_modal_projector(hidden[:, 1:]))
