"""LLaVA-1.5: CLIP tower and projector in front of a native Llama.

Three layouts on disk, one model:
- original (liuhaotian/llava-v1.5-7b): a flat config, the tower in a folder of its own;
- original with the tower inside (openbmb/RLAIF-V-7B);
- llava-hf/llava-1.5-7b-hf: nested configs, other prefixes, and rows appended to the vocabulary,
  which are left out of the softmax here so that log-probs equal the original's.

All are asked in the same words (conversation template `llava_v1`) and see the same picture: padded
to a square where the config says so, which is how LLaVA-1.5 was trained and how RLAIF-V sampled.
RLAIF-V scored and trained on a centre crop; here one picture serves both, and log-probs of two
pictures are never subtracted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedConfig,
)

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models.base import IMAGE_SLOT, Prompt, VisionLanguageModel
from stream_engine.models.checkpoints import (
    empty_weights,
    load_into,
    load_shared,
    read_own_config,
    resolve_device,
    resolve_dtype,
)
from stream_engine.models.images import ClipPreprocessing, clip_pixels
from stream_engine.models.intact import read_json, refuse_broken_files
from stream_engine.models.language import language_config
from stream_engine.models.native import check_length
from stream_engine.models.weight_files import LEGACY_BUFFERS, WeightFiles
from stream_engine.records import IMAGE_MARK

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""openai/clip-vit-large-patch14-336, for checkpoints that hold its weights but not its config."""

CLIP_TEXT_HALF = r"^(text_model\.|text_projection|visual_projection|logit_scale)"


def load(checkpoint: Path, config: ModelConfig) -> LlavaModel:
    """Load any of the three layouts; see `models.Family`."""
    stated = read_own_config(checkpoint)
    layout = _hf_layout(stated) if "text_config" in stated else _original_layout(stated)
    weights = WeightFiles(checkpoint)
    device, dtype = resolve_device(config), resolve_dtype(config, stated, weights)
    tower_dir = _tower_dir(checkpoint, stated, config, inside=_has_tower(weights))

    with empty_weights():
        lm = LlamaForCausalLM(layout.text)  # type: ignore[arg-type]
    load_into(lm, weights, _language_name, device=device, dtype=dtype)
    with empty_weights():
        projector = _projector(layout.projector)
    load_into(projector, weights, _projector_name, device=device, dtype=dtype)
    tower = _load_tower(layout, weights, tower_dir, device=device, dtype=dtype)
    weights.discard(LEGACY_BUFFERS)
    weights.check_all_used()
    return LlavaModel(checkpoint, layout, lm, tower, projector, tower_dir)


class LlavaModel(VisionLanguageModel):
    """A loaded LLaVA-1.5 checkpoint."""

    family = "llava"
    places_images = False  # as it was trained
    turn_marks = ("USER:", "ASSISTANT:")

    def __init__(
        self,
        checkpoint: Path,
        layout: Layout,
        lm: LlamaForCausalLM,
        tower: CLIPVisionModel,
        projector: nn.Module,
        tower_dir: Path | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = _load_tokenizer(checkpoint)
        self.backbone = lm.model
        self.lm_head = lm.lm_head
        self.vocab_size = layout.vocab_size
        self.stop_token_ids = frozenset({self.tokenizer.eos_token_id})
        self.generation_defaults = read_json(checkpoint / "generation_config.json")
        self.tower = tower
        self.projector = projector
        self.keeps_cls = layout.keeps_cls
        self.pads = layout.pads
        stated = read_json(checkpoint / "preprocessor_config.json")
        if tower_dir is not None:
            stated = read_json(tower_dir / "preprocessor_config.json") or stated
        size: Any = tower.config.image_size
        self.preprocessing = ClipPreprocessing.from_config(stated, image_size=size)
        self.tokens_per_image = tower.embeddings.num_patches + self.keeps_cls

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        marks = f"{IMAGE_MARK}\n" * len(images)
        text = f"{SYSTEM} USER: {marks}{question} ASSISTANT:"
        ids = self._tokenize(text)
        pixels = [clip_pixels(image, self.preprocessing, pad=self.pads) for image in images]
        return Prompt(ids=ids, digest=self.digest(ids, pixels), vision=pixels)

    def _tokenize(self, text: str) -> list[int]:
        """Each chunk between image marks by itself, as LLaVA does; one BOS at the start."""
        bos = self.tokenizer.bos_token_id
        ids = [bos]
        for number, chunk in enumerate(text.split(IMAGE_MARK)):
            if number:
                ids += [IMAGE_SLOT] * self.tokens_per_image
            ids += self.encode_text(chunk)
        return ids

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        pixels = [image for prompt in prompts for image in prompt.vision]
        if not pixels:
            return [None] * len(prompts)
        batch = torch.stack(pixels).to(self.device, self.dtype)
        hidden = self.tower(pixel_values=batch).last_hidden_state
        features = self.projector(hidden if self.keeps_cls else hidden[:, 1:])
        of_prompt = features.split([len(prompt.vision) for prompt in prompts])
        return [rows.flatten(0, 1) if len(rows) else None for rows in of_prompt]


@dataclass(frozen=True)
class Layout:
    """What a config.json says, in one form for all layouts."""

    text: PreTrainedConfig
    vision: CLIPVisionConfig | None
    """None: the config lies beside the tower's weights."""
    projector: list[tuple[int, int, bool]]
    """(in, out, bias) of each linear layer; GELU between them."""
    select_layer: int
    keeps_cls: bool
    pads: bool
    vocab_size: int


def _original_layout(stated: dict[str, Any]) -> Layout:
    if stated.get("mm_use_im_start_end"):
        raise CheckpointError("mm_use_im_start_end is true; only LLaVA-1.5 prompts are supported")
    ratio = stated.get("image_aspect_ratio") or "square"
    if ratio not in ("pad", "square"):
        raise CheckpointError(f"image_aspect_ratio {ratio!r} is not supported; pad and square are")
    text = language_config(LlamaConfig, stated)
    return Layout(
        text=text,
        vision=_vision_config(stated["vision_config"]) if "vision_config" in stated else None,
        projector=_projector_sizes(stated, text.hidden_size),
        select_layer=stated.get("mm_vision_select_layer", -2),
        keeps_cls=stated.get("mm_vision_select_feature", "patch") == "cls_patch",
        pads=ratio == "pad",
        vocab_size=text.vocab_size,
    )


def _hf_layout(stated: dict[str, Any]) -> Layout:
    text = language_config(LlamaConfig, stated["text_config"])
    vision = _vision_config(CLIP_L_336 | (stated.get("vision_config") or {}))
    activation = stated.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"projector_hidden_act {activation!r} is not supported; gelu is")
    bias = stated.get("multimodal_projector_bias", True)
    hidden = text.hidden_size
    image_token = stated.get("image_token_index", stated.get("image_token_id", text.vocab_size))
    return Layout(
        text=text,
        vision=vision,
        projector=[(vision.hidden_size, hidden, bias), (hidden, hidden, bias)],
        select_layer=stated.get("vision_feature_layer", -2),
        keeps_cls=stated.get("vision_feature_select_strategy", "default") == "full",
        pads=True,
        vocab_size=min(text.vocab_size, image_token),
    )


def _vision_config(stated: dict[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(**stated)


def _projector_sizes(stated: dict[str, Any], hidden: int) -> list[tuple[int, int, bool]]:
    kind = stated.get("mm_projector_type", "linear")
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and not mlp:
        raise CheckpointError(f"mm_projector_type {kind!r} is not supported; mlpNx_gelu is")
    depth = int(mlp[1]) if mlp else 1
    sizes = [stated["mm_hidden_size"]] + [hidden] * depth
    return [(size_in, size_out, True) for size_in, size_out in pairwise(sizes)]


def _projector(sizes: list[tuple[int, int, bool]]) -> nn.Module:
    layers: list[nn.Module] = []
    for size_in, size_out, bias in sizes:
        layers += [nn.GELU()] if layers else []
        layers += [nn.Linear(size_in, size_out, bias=bias)]
    return nn.Sequential(*layers)


def _language_name(stored: str) -> str | None:
    if found := re.match(r"language_model\.((?:model\.|lm_head\.).*)", stored):
        return found[1]
    if found := re.match(r"model\.language_model\.(.*)", stored):
        return f"model.{found[1]}"
    return stored if re.match(r"model\.(embed_tokens|layers|norm)\.|lm_head\.", stored) else None


def _projector_name(stored: str) -> str | None:
    if found := re.match(r"(?:model\.)?multi_modal_projector\.linear_([12])\.(.*)", stored):
        return f"{2 * int(found[1]) - 2}.{found[2]}"
    if found := re.match(r"model\.mm_projector\.(?:(\d+)\.)?(weight|bias)$", stored):
        return f"{found[1] or 0}.{found[2]}"
    return None


def _tower_name(stored: str) -> str | None:
    """The part after the prefix; transformers 5's tower has no `vision_model` level."""
    prefix = r"(?:model\.)?(?:vision_tower\.)+(?:vision_model\.)?|vision_model\."
    found = re.match(rf"(?:{prefix})(.*)", stored)
    return found[1] if found else None


def _has_tower(weights: WeightFiles) -> bool:
    return any(_tower_name(name) for name in weights.names)


def _tower_dir(
    checkpoint: Path, stated: dict[str, Any], config: ModelConfig, *, inside: bool
) -> Path | None:
    """The folder of the CLIP weights, or of their config alone where the weights are inside."""
    candidates = []
    if named := stated.get("mm_vision_tower"):
        candidates = [checkpoint / named, checkpoint.parent / named]
    if config.vision_tower_path and not inside:
        candidates = [Path(config.vision_tower_path)]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            refuse_broken_files(candidate)
            return candidate
    if inside:
        return None
    if config.vision_tower_path:
        raise CheckpointError(f"--vision_tower_path {config.vision_tower_path} has no config.json")
    raise CheckpointError(
        f"{checkpoint} holds no vision tower; download {named or 'its CLIP model'} and pass its "
        f"folder as --vision_tower_path"
    )


def _load_tower(
    layout: Layout,
    weights: WeightFiles,
    tower_dir: Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> CLIPVisionModel:
    """The tower up to the selected layer; those after it are never built."""
    vision = layout.vision or _vision_config(CLIP_L_336)
    if tower_dir is not None:
        beside = read_json(tower_dir / "config.json")
        vision = _vision_config(beside.get("vision_config") or beside)
    depth, selected = vision.num_hidden_layers, layout.select_layer
    kept = selected if selected >= 0 else depth + 1 + selected
    if not 0 < kept <= depth:
        raise CheckpointError(f"vision layer {selected} is selected of a tower of {depth}")
    vision.num_hidden_layers = kept
    vision._attn_implementation = "sdpa"

    tower_weights = weights if _has_tower(weights) or tower_dir is None else WeightFiles(tower_dir)
    tower = load_shared(
        vision.to_json_string(),
        lambda: CLIPVisionModel(deepcopy(vision)),
        tower_weights,
        _tower_name,
        device=device,
        dtype=dtype,
    )
    for layer in range(kept, depth):
        tower_weights.discard(rf"(^|\.)(vision_tower|vision_model)\..*encoder\.layers\.{layer}\.")
    if tower_weights is not weights:
        tower_weights.discard(LEGACY_BUFFERS)
        tower_weights.discard(CLIP_TEXT_HALF)
        tower_weights.check_all_used()
    return tower


def _load_tokenizer(checkpoint: Path) -> LlamaTokenizer:
    """By its own class: AutoTokenizer loses the leading mark of each chunk on this layout."""
    if not any((checkpoint / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise CheckpointError(f"{checkpoint} has no tokenizer.model; download it again")
    tokenizer = LlamaTokenizer.from_pretrained(checkpoint, local_files_only=True)
    check_length(checkpoint, tokenizer)
    return tokenizer
