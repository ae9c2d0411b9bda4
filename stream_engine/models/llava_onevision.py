"""LLaVA-Critic and its base LLaVA-OneVision (original format): SigLIP crops in front of a Qwen2.

One picture is seen at high resolution (`anyres`); several pictures are padded to squares and seen
once each, as the family was trained. The tower's features are those of its last kept layer,
without the layer norm behind it. The conversation is Qwen's (`qwen_1_5`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models.anyres import Anyres, Layout, layout, merge, read_pinpoints, views
from stream_engine.models.base import IMAGE_SLOT, Prompt, VisionLanguageModel
from stream_engine.models.checkpoints import (
    empty_weights,
    load_into,
    load_shared,
    read_own_config,
    resolve_device,
    resolve_dtype,
)
from stream_engine.models.images import normalise, once_per_image, squared
from stream_engine.models.intact import read_json
from stream_engine.models.language import (
    LANGUAGE_NAME,
    load_language_model,
    load_tokenizer,
    stop_token_ids,
)
from stream_engine.models.weight_files import LEGACY_BUFFERS, WeightFiles
from stream_engine.records import IMAGE_MARK, without_marks

SYSTEM = "You are a helpful assistant."
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"
CROPS_PER_BATCH = 32
"""A picture may have 37 crops of 729 patches; this bounds what goes through the tower at once."""

SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""google/siglip-so400m-patch14-384, whose weights the checkpoint holds, but not its config."""


def load(checkpoint: Path, config: ModelConfig) -> LlavaOnevisionModel:
    """Load strictly; see `models.Family`."""
    stated = read_own_config(checkpoint)
    front = read_front(checkpoint, stated, config)
    weights = WeightFiles(checkpoint)
    device, dtype = resolve_device(config), resolve_dtype(config, stated, weights)

    lm = load_language_model(
        Qwen2ForCausalLM, stated, weights, _language_name, device=device, dtype=dtype
    )
    _check_tower(checkpoint, front, weights)
    tower = load_shared(
        front.tower.to_json_string(),
        lambda: SiglipVisionModel(deepcopy(front.tower)),
        weights,
        _tower_name,
        device=device,
        dtype=dtype,
    )
    with empty_weights():
        projector = Projector(
            projector_depth(checkpoint, stated), front.tower.hidden_size, lm.config.hidden_size
        )
    load_into(projector, weights, _projector_name, device=device, dtype=dtype)
    weights.discard(LEGACY_BUFFERS)
    weights.check_all_used()
    return LlavaOnevisionModel(checkpoint, stated, front, lm, tower, projector)


@dataclass(frozen=True)
class Front:
    """What the front end needs to know of config.json and of the tower's folder."""

    tower: SiglipVisionConfig
    """With the layers that are kept: all but the last."""
    anyres: Anyres
    pads: bool
    """image_aspect_ratio "pad": a single picture is padded and seen once, too."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Picture:
    """One preprocessed picture: pixels [views, 3, H, W], and its layout when cut into crops."""

    pixels: Tensor
    layout: Layout | None


class Projector(nn.Sequential):
    """The layers behind the tower, and the feature that ends a row of patches."""

    def __init__(self, depth: int, source: int, hidden: int) -> None:
        layers: list[nn.Module] = [nn.Linear(source, hidden)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden, hidden)]
        super().__init__(*layers)
        self.newline = nn.Parameter(torch.empty(hidden))


class LlavaOnevisionModel(VisionLanguageModel):
    """A loaded LLaVA-Critic checkpoint."""

    family = "llava_onevision"

    def __init__(
        self,
        checkpoint: Path,
        stated: dict[str, Any],
        front: Front,
        lm: Qwen2ForCausalLM,
        tower: SiglipVisionModel,
        projector: Projector,
    ) -> None:
        self.checkpoint = checkpoint
        self.front = front
        self.tokenizer = load_tokenizer(checkpoint)
        self.backbone = lm.model
        self.lm_head = lm.lm_head
        self.vocab_size = lm.config.vocab_size
        self.max_prompt_tokens: int = min(
            lm.config.max_position_embeddings,
            stated.get("tokenizer_model_max_length") or lm.config.max_position_embeddings,
        )
        self.stop_token_ids = stop_token_ids(checkpoint, self.tokenizer)
        self.generation_defaults = read_json(checkpoint / "generation_config.json")
        self.tower = tower
        self.projector = projector

    def asked(self, question: str, num_images: int) -> str:
        """A single picture comes first, as it was trained; several stay at their marks."""
        return without_marks(question) if num_images == 1 else question

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        pictures = self.preprocess(images)
        text = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{marked(question, len(images))}<|im_end|>\n"
            f"<|im_start|>assistant\n"
        )
        ids: list[int] = []
        for number, chunk in enumerate(text.split(IMAGE_MARK)):
            if number:
                ids += [IMAGE_SLOT] * self.num_features(pictures[number - 1])
            ids += self.encode_text(chunk)
        if len(ids) > self.max_prompt_tokens:
            raise RecordError("prompt_too_long", f"{len(ids)} tokens of {self.max_prompt_tokens}")
        digest = self.digest(ids, [picture.pixels for picture in pictures])
        return Prompt(ids=ids, digest=digest, vision=pictures)

    def preprocess(self, images: Sequence[Image.Image]) -> list[Picture]:
        """Pixels: crops of a single picture, a padded square of each of several."""
        cuts = not self.front.pads and len(images) == 1
        return [preprocess_image(image, self.front, cuts=cuts) for image in images]

    def num_features(self, picture: Picture) -> int:
        """Rows that the picture takes in a prompt."""
        patches = self.front.anyres.grid**2
        return patches + (picture.layout.num_crop_features if picture.layout else 1)

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        pictures = [picture for prompt in prompts for picture in prompt.vision]
        if not pictures:
            return [None] * len(prompts)
        crops = torch.cat([picture.pixels for picture in pictures])
        encoded = torch.cat([self.encode_crops(batch) for batch in crops.split(CROPS_PER_BATCH)])
        of_picture = encoded.split([len(picture.pixels) for picture in pictures])
        rows = iter(
            [self.merge(picture, features) for picture, features in zip(pictures, of_picture)]
        )
        return [
            torch.cat([next(rows) for _ in prompt.vision]) if prompt.vision else None
            for prompt in prompts
        ]

    def encode_crops(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> projected features [B, G*G, D]."""
        return self.projector(self.tower_features(pixels))

    def tower_features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last kept layer's output [B, G*G, C]; no layer norm follows it."""
        hidden = self.tower.embeddings(pixels.to(self.device, self.dtype))
        return self.tower.encoder(inputs_embeds=hidden).last_hidden_state

    def merge(self, picture: Picture, features: Tensor) -> Tensor:
        """Projected features [views, G*G, D] -> the picture's rows in the prompt."""
        newline = self.projector.newline
        if picture.layout is None:
            return torch.cat([features[0], newline[None]])
        return merge(features, picture.layout, newline, self.front.anyres)


def marked(question: str, num_images: int) -> str:
    """The user's turn with one mark a picture: those of the question, or all of them in front."""
    if num_images and question.count(IMAGE_MARK) == num_images:
        return question
    front = " ".join([IMAGE_MARK] * num_images)
    return front + "\n" * bool(num_images) + question


@once_per_image
def preprocess_image(image: Image.Image, front: Front, *, cuts: bool) -> Picture:
    """One picture, cut into crops, or whole on a square."""
    side, resample = front.anyres.crop, Image.Resampling.BICUBIC
    if cuts:
        place, seen = layout(image.size, front.anyres), views(image, front.anyres)
        resized = [view.resize((side, side), resample=resample) for view in seen]
    else:
        background = tuple(int(value * 255) for value in front.mean)
        place, resized = None, [squared(image.convert("RGB"), background, side, resample)]
    return Picture(torch.stack([normalise(v, front.mean, front.std) for v in resized]), place)


def read_front(checkpoint: Path, stated: dict[str, Any], config: ModelConfig) -> Front:
    """Gather the front end's settings; raises CheckpointError for what is not supported."""
    merge_type = stated.get("mm_patch_merge_type", "flat")
    if merge_type != "spatial_unpad":
        raise CheckpointError(
            f"{checkpoint}: mm_patch_merge_type {merge_type!r} is not supported; spatial_unpad is"
        )
    ratio = str(stated.get("image_aspect_ratio"))
    anyres_max = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if ratio not in ("pad", "anyres") and not anyres_max:
        raise CheckpointError(
            f"{checkpoint}: image_aspect_ratio {ratio!r} is not supported; "
            f"anyres_max_N, anyres and pad are"
        )
    folder = _tower_dir(checkpoint, stated, config)
    beside = read_json(folder / "config.json") if folder else {}
    sizes: dict[str, Any] = SO400M_384 | (beside.get("vision_config") or beside)
    tower = SiglipVisionConfig(**sizes | {"vision_use_head": False})
    tower.num_hidden_layers -= 1
    tower._attn_implementation = "sdpa"
    pixels = read_json(folder / "preprocessor_config.json") if folder else {}
    try:
        pinpoints = read_pinpoints(stated.get("image_grid_pinpoints"), sizes["image_size"])
    except (ValueError, SyntaxError, IndexError) as error:
        if ratio != "pad":
            raise CheckpointError(
                f"{checkpoint}: cannot read image_grid_pinpoints: {error}"
            ) from error
        pinpoints = ()
    return Front(
        tower=tower,
        anyres=Anyres(
            crop=sizes["image_size"],
            grid=sizes["image_size"] // sizes["patch_size"],
            pinpoints=pinpoints,
            max_crops=int(anyres_max[1]) if anyres_max else None,
        ),
        pads=ratio == "pad",
        mean=tuple(pixels.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(pixels.get("image_std", (0.5, 0.5, 0.5))),
    )


def _tower_dir(checkpoint: Path, stated: dict[str, Any], config: ModelConfig) -> Path | None:
    """A folder with a SigLIP config: as told, as named, or inside the checkpoint's."""
    folders = [checkpoint / str(stated["mm_vision_tower"])]
    folders += sorted(path.parent for path in checkpoint.glob("*/config.json"))
    if config.vision_tower_path:
        folders.insert(0, Path(config.vision_tower_path))
    for folder in folders:
        if str(read_json(folder / "config.json").get("model_type")).startswith("siglip"):
            return folder
    return None


def _check_tower(checkpoint: Path, front: Front, weights: WeightFiles) -> None:
    """Heads and crop size stand in no tensor: a tower of other shapes needs its own config."""
    name = f"{TOWER}embeddings.position_embedding.weight"
    if name not in weights:
        raise CheckpointError(f"{checkpoint} holds no vision tower: {name} is missing")
    expected = (front.anyres.grid**2, front.tower.hidden_size)
    if weights.shape(name) != expected:
        raise CheckpointError(
            f"{checkpoint}: the tower's positions are {weights.shape(name)}, its config says "
            f"{expected}; give the folder of the tower's own config as --vision_tower_path"
        )


def projector_depth(checkpoint: Path, stated: dict[str, Any]) -> int:
    """The number of linear layers; raises CheckpointError for other kinds of projector."""
    kind = stated.get("mm_projector_type", "linear")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not depth:
        raise CheckpointError(
            f"{checkpoint}: mm_projector_type {kind!r} is not supported; mlpNx_gelu is"
        )
    return int(depth[1])


def _language_name(stored: str) -> str | None:
    return stored if re.match(LANGUAGE_NAME, stored) else None


def _tower_name(stored: str) -> str | None:
    return stored.removeprefix(TOWER) if stored.startswith(TOWER) else None


def _projector_name(stored: str) -> str | None:
    if stored == NEWLINE:
        return "newline"
    return stored.removeprefix(PROJECTOR) if stored.startswith(PROJECTOR) else None
