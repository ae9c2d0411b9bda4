"""OmniLMM-12B and RLAIF-V-12B: an EVA02-E tower and a resampler in front of a native Mistral.

A picture is squeezed to a square, becomes `num_query` feature rows, and stands in the user's turn
between <im_start> and <im_end>, which are added to the tokenizer on load where it lacks them. The
conversation is Zephyr's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import MistralForCausalLM

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.models.checkpoints import (
    empty_weights,
    load_into,
    load_shared,
    read_own_config,
    resolve_device,
    resolve_dtype,
)
from stream_engine.models.eva import EvaTower
from stream_engine.models.images import CLIP_MEAN, CLIP_STD, normalise_single, once_per_image
from stream_engine.models.intact import read_json
from stream_engine.models.language import (
    LANGUAGE_NAME,
    load_language_model,
    load_tokenizer,
    stop_token_ids,
    token_id,
)
from stream_engine.models.placeholders import fill_slots, place_images
from stream_engine.models.resampler import Resampler, resized_positions
from stream_engine.models.weight_files import LEGACY_BUFFERS, WeightFiles

logger = logging.getLogger(__name__)

SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite "
    "answers to the human's questions."
)
PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"
MAX_PROMPT_TOKENS = 2048
"""The length the model was trained and sampled with; its own code cuts longer prompts."""
TOWER_HEADS, TOWER_WIDTH = 16, 1792
"""EVA02-E's; no file of the checkpoint tells its heads. `mm_vision_heads` in config.json does."""
SMALL_HEAD_SIZE = 16
TOWER, RESAMPLER = "model.vision_tower.", "model.resampler."


def load(checkpoint: Path, config: ModelConfig) -> OmniLmmModel:
    """Load strictly; see `models.Family`."""
    stated = read_own_config(checkpoint)
    for name in ("num_query", "image_size"):
        if not isinstance(stated.get(name), int):
            raise CheckpointError(f"{checkpoint}: config.json does not state {name}")
    if not stated.get("mm_use_im_start_end"):
        raise CheckpointError(f"{checkpoint}: mm_use_im_start_end is false; OmniLMM needs it true")
    weights = WeightFiles(checkpoint)
    device, dtype = resolve_device(config), resolve_dtype(config, stated, weights)

    lm = load_language_model(
        MistralForCausalLM, stated, weights, _language_name, device=device, dtype=dtype
    )
    sizes = tower_sizes(weights, stated.get("mm_vision_heads"))
    if sizes["width"] != TOWER_WIDTH and "mm_vision_heads" not in stated:
        logger.warning(
            "%s: the tower is not EVA02-E (width %d); %d heads are assumed, since config.json "
            "does not state mm_vision_heads",
            checkpoint,
            sizes["width"],
            sizes["num_heads"],
        )
    tower = load_shared(
        f"EvaTower {sizes}",
        lambda: EvaTower(**sizes),
        weights,
        _tower_name,
        device=device,
        dtype=dtype,
    )
    with empty_weights():
        resampler = Resampler(
            num_queries=stated["num_query"],
            width=lm.config.hidden_size,
            source_width=sizes["width"],
            stores_positions=True,
        )
    load_into(resampler, weights, _resampler_name, device=device, dtype=dtype)
    weights.discard(LEGACY_BUFFERS)
    weights.check_all_used()
    return OmniLmmModel(checkpoint, stated, lm, tower, resampler)


class OmniLmmModel(VisionLanguageModel):
    """A loaded OmniLMM checkpoint."""

    family = "omnilmm"
    turn_marks = ("<|system|>", "<|user|>", "<|assistant|>")

    def __init__(
        self,
        checkpoint: Path,
        stated: dict[str, Any],
        lm: MistralForCausalLM,
        tower: EvaTower,
        resampler: Resampler,
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = load_tokenizer(checkpoint)
        self.tokenizer.add_tokens([PATCH, START, END], special_tokens=True)
        self.backbone = lm.model
        self.lm_head = lm.lm_head
        self.vocab_size = lm.config.vocab_size
        self.stop_token_ids = stop_token_ids(checkpoint, self.tokenizer)
        self.generation_defaults = read_json(checkpoint / "generation_config.json")
        self.tower = tower
        self.resampler = resampler
        self.image_size: int = stated["image_size"]
        self.num_queries: int = stated["num_query"]
        self._patch, self._start, end = (
            token_id(self.tokenizer, token, checkpoint) for token in (PATCH, START, END)
        )
        if (highest := max(self._patch, self._start, end)) >= self.vocab_size:
            raise CheckpointError(
                f"{checkpoint}: the image tokens need ids up to {highest}, but the vocabulary "
                f"has {self.vocab_size} rows"
            )
        self._newline = super().encode_text("\n")

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        if len(images) > 1:
            raise RecordError("too_many_images", f"{len(images)} images; OmniLMM takes one")
        block = START + PATCH * self.num_queries + END
        content = place_images(question, [block] * len(images))
        text = f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{content}</s>\n<|assistant|>\n"
        ids = fill_slots(
            [self.tokenizer.bos_token_id, *super().encode_text(text)],
            starts={self._start},
            filler=self._patch,
            length=self.num_queries,
            num_blocks=len(images),
        )
        if len(ids) > MAX_PROMPT_TOKENS:
            raise RecordError("prompt_too_long", f"{len(ids)} tokens of {MAX_PROMPT_TOKENS}")
        pixels = [squeezed_pixels(image, self.image_size) for image in images]
        return Prompt(ids=ids, digest=self.digest(ids, pixels), vision=pixels)

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        pixels = [image for prompt in prompts for image in prompt.vision]
        if not pixels:
            return [None] * len(prompts)
        features = iter(self.encode_pixels(torch.stack(pixels)))
        return [next(features) if prompt.vision else None for prompt in prompts]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> feature rows [B, Q, D]."""
        patches = self.tower(pixels.to(self.device, self.dtype))[:, 1:]
        table = self.resampler.pos_embed
        return self.resampler(
            patches, resized_positions(table, patches.shape[1]), query_positions=table
        )

    def encode_text(self, text: str) -> list[int]:
        """As an answer: it follows a newline, so its first word bears no word mark."""
        return super().encode_text("\n" + text)[len(self._newline) :]


@once_per_image
def squeezed_pixels(image: Image.Image, side: int) -> Tensor:
    """[3, side, side], the aspect ratio not kept."""
    image = image.convert("RGB").resize((side, side), resample=Image.Resampling.BICUBIC)
    return normalise_single(image, CLIP_MEAN, CLIP_STD)


def tower_sizes(weights: WeightFiles, num_heads: int | None) -> dict[str, int]:
    """The tower's sizes, from the shapes of its tensors.

    Where the number of heads is not told, it is EVA02-E's for a tower of that width, and else
    what gives heads of 16 channels, as small towers made for tests have.

    Raises:
        CheckpointError: when there is no tower, or its width does not divide into the heads.
    """
    kernel, mlp = f"{TOWER}patch_embed.proj.weight", f"{TOWER}blocks.0.mlp.fc1.weight"
    table = f"{TOWER}pos_embed"
    if lacking := [name for name in (kernel, mlp, table) if name not in weights]:
        raise CheckpointError(
            f"{weights.checkpoint} holds no vision tower: {lacking[0]} is missing"
        )
    width, _, patch_size, _ = weights.shape(kernel)
    if num_heads is None:
        num_heads = TOWER_HEADS if width == TOWER_WIDTH else max(1, width // SMALL_HEAD_SIZE)
    if width % num_heads:
        raise CheckpointError(
            f"{weights.checkpoint}: a tower of width {width} cannot have {num_heads} heads; "
            f"state mm_vision_heads in config.json"
        )
    blocks = {found[1] for n in weights.names if (found := re.match(rf"{TOWER}blocks\.(\d+)\.", n))}
    return {
        "width": width,
        "depth": len(blocks),
        "num_heads": num_heads,
        "mlp_width": weights.shape(mlp)[0],
        "patch_size": patch_size,
        "num_positions": weights.shape(table)[1],
    }


def _language_name(stored: str) -> str | None:
    return stored if re.match(LANGUAGE_NAME, stored) else None


def _tower_name(stored: str) -> str | None:
    return stored.removeprefix(TOWER) if stored.startswith(TOWER) else None


def _resampler_name(stored: str) -> str | None:
    return stored.removeprefix(RESAMPLER) if stored.startswith(RESAMPLER) else None
