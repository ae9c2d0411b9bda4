"""MiniCPM-V 2.6 (Qwen2) and MiniCPM-Llama3-V 2.5 (Llama): slices, a SigLIP tower, a resampler.

Both versions share a layout on disk and the class name MiniCPMV; `version` in config.json tells
them apart. What each was trained with, and what the other would get wrong:

- 2.5 takes a conversation's slices as one batch, padded to the longest. The padding is attended to
  and positions run along one row of the table, as if every slice were a strip of the longest
  length. A slice's features therefore depend on its companions: the slices of one prompt are
  encoded together and with nothing else.
- 2.6 gives each slice its own two-dimensional positions and hides the padding, so that any slices
  may share a batch.
- Both place positions by the 2024 formula (`bucket_positions`), from which later library versions
  differ by rounding.

No token of the prompt is ever masked (2.6's own `chat` hides every "!", its padding id).

Legend: S slices, L patches of the longest slice, C tower's width, Q queries, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.models.checkpoints import (
    empty_weights,
    load_into,
    load_shared,
    read_own_config,
    resolve_device,
    resolve_dtype,
)
from stream_engine.models.intact import read_json
from stream_engine.models.language import (
    load_language_model,
    load_tokenizer,
    stop_token_ids,
    token_id,
)
from stream_engine.models.placeholders import fill_slots, place_images
from stream_engine.models.resampler import Resampler, sine_positions
from stream_engine.models.slices import Size, Slice, Slicing, slice_image
from stream_engine.models.weight_files import LEGACY_BUFFERS, WeightFiles

LANGUAGE_MODELS: dict[str, type[PreTrainedModel]] = {
    "2.5": LlamaForCausalLM,
    "2.6": Qwen2ForCausalLM,
}
END_TOKENS = {"2.5": ("<|eot_id|>",), "2.6": ("<|im_end|>", "<|endoftext|>")}


def load(checkpoint: Path, config: ModelConfig) -> MiniCpmVModel:
    """Load either version; see `models.Family`."""
    stated = read_own_config(checkpoint)
    version = str(stated.get("version"))
    if version not in LANGUAGE_MODELS:
        raise CheckpointError(
            f"{checkpoint} is MiniCPM-V version {version}; versions "
            f"{' and '.join(LANGUAGE_MODELS)} are supported"
        )
    front = read_front(checkpoint, stated, version)
    weights = WeightFiles(checkpoint)
    device, dtype = resolve_device(config), resolve_dtype(config, stated, weights)

    lm = load_language_model(
        LANGUAGE_MODELS[version], stated, weights, _part("llm."), device=device, dtype=dtype
    )
    tower = load_shared(
        front.tower.to_json_string(),
        lambda: SiglipVisionModel(deepcopy(front.tower)),
        weights,
        _part("vpm."),
        device=device,
        dtype=dtype,
    )
    with empty_weights():
        resampler = Resampler(
            num_queries=front.num_queries,
            width=lm.config.hidden_size,
            source_width=front.tower.hidden_size,
            stores_positions=False,
        )
    load_into(resampler, weights, _part("resampler."), device=device, dtype=dtype)
    weights.discard(LEGACY_BUFFERS)
    weights.check_all_used()
    return MiniCpmVModel(checkpoint, front, lm, tower, resampler)


@dataclass(frozen=True)
class Front:
    """config.json and preprocessor_config.json, as far as they bear on the front end."""

    version: str
    tower: SiglipVisionConfig
    slicing: Slicing
    num_queries: int
    slices_per_batch: int
    """2.6: how many slices go through the tower at once."""
    encodes_together: bool
    """2.5: whether a conversation's slices are one batch."""
    numbers_images: bool
    marks: dict[str, str]
    """The texts that announce images and slices, by preprocessor_config.json's names."""


class MiniCpmVModel(VisionLanguageModel):
    """A loaded MiniCPM-V checkpoint."""

    family = "minicpm_v"

    def __init__(
        self,
        checkpoint: Path,
        front: Front,
        lm: PreTrainedModel,
        tower: SiglipVisionModel,
        resampler: Resampler,
    ) -> None:
        self.checkpoint = checkpoint
        self.front = front
        self.tokenizer = load_tokenizer(checkpoint)
        if not self.tokenizer.chat_template:
            raise CheckpointError(f"{checkpoint} has no chat_template; download it again")
        self.backbone = lm.model
        self.lm_head = lm.lm_head
        self.vocab_size = lm.config.vocab_size
        self.stop_token_ids = stop_token_ids(checkpoint, self.tokenizer, *END_TOKENS[front.version])
        self.own_end = END_TOKENS[front.version][0]
        self.generation_defaults = read_json(checkpoint / "generation_config.json")
        self.tower = tower
        self.resampler = resampler
        starts = ["im_start"] if front.version == "2.5" else ["im_start", "slice_start"]
        self._starts = {token_id(self.tokenizer, front.marks[s], checkpoint) for s in starts}
        self._filler = token_id(self.tokenizer, front.marks["unk"], checkpoint)
        added = self.tokenizer.added_tokens_decoder
        self._silent = {i for i, token in added.items() if token.special and token.content != "!"}

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        slices: list[Slice] = []
        blocks = []
        for number, image in enumerate(images):
            pieces, grid = slice_image(image, self.front.slicing)
            slices += pieces
            blocks.append(image_block(self.front, number, grid))
        ids = fill_slots(
            self.encode_text(self.prompt_text(place_images(question, blocks))),
            starts=self._starts,
            filler=self._filler,
            length=self.front.num_queries,
            num_blocks=len(slices),
        )
        digest = self.digest(ids, [piece.pixels for piece in slices])
        return Prompt(ids=ids, digest=digest, vision=slices)

    def prompt_text(self, content: str) -> str:
        """The checkpoint's own chat template around one user turn, up to the answer."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        of_prompt = [len(prompt.vision) for prompt in prompts]
        slices = [piece for prompt in prompts for piece in prompt.vision]
        if not slices:
            return [None] * len(prompts)
        batches = self._batches(prompts, slices)
        features = torch.cat([self.encode_slices(batch) for batch in batches])
        return [rows.flatten(0, 1) if len(rows) else None for rows in features.split(of_prompt)]

    def encode_slices(self, slices: Sequence[Slice]) -> Tensor:
        """Features [S, Q, D] of slices that go through the tower as one batch."""
        positions = pad_sequence(
            [sine_positions(s.rows, s.columns, self.resampler.query.shape[1]) for s in slices],
            batch_first=True,
        )
        return self.resampler(
            self.tower_features(slices),
            positions.to(self.device),
            is_padding=_is_padding(slices).to(self.device),
        )

    def tower_features(self, slices: Sequence[Slice]) -> Tensor:
        """[S, L, C], rows of shorter slices padded at the end (with meaning only in 2.5)."""
        patch = self.front.slicing.patch_size
        strips = pad_sequence([s.pixels.flatten(0, 1).T for s in slices], batch_first=True)
        pixels = strips.transpose(1, 2).unflatten(1, (3, patch))
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixels.to(self.device, self.dtype))
        hidden = patches.flatten(2).mT
        hidden = hidden + embeddings.position_embedding(self._position_ids(slices))
        mask = None
        if self.front.version != "2.5":
            mask = ~_is_padding(slices)[:, None, None].to(self.device)
        encoded = self.tower.encoder(inputs_embeds=hidden, attention_mask=mask)
        return self.tower.post_layernorm(encoded.last_hidden_state)

    def _position_ids(self, slices: Sequence[Slice]) -> Tensor:
        """[S, L] rows of the tower's position table."""
        side = math.isqrt(self.tower.embeddings.num_positions)
        if self.front.version == "2.5":
            longest = max(piece.num_patches for piece in slices)
            return bucket_positions(1, longest, side).expand(len(slices), -1).to(self.device)
        of_slice = [bucket_positions(piece.rows, piece.columns, side) for piece in slices]
        return pad_sequence(of_slice, batch_first=True).to(self.device)

    def _batches(self, prompts: Sequence[Prompt], slices: list[Slice]) -> list[list[Slice]]:
        """Slices in order, as they go through the tower."""
        if self.front.version == "2.5" and self.front.encodes_together:
            return [prompt.vision for prompt in prompts if prompt.vision]
        size = 1 if self.front.version == "2.5" else self.front.slices_per_batch
        return [slices[start : start + size] for start in range(0, len(slices), size)]

    def closing_ids(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(self.own_end)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """As the base class does, but keeps "!", which 2.5 declares special as its padding."""
        kept = [i for i in token_ids if i not in self._silent]
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()


def image_block(front: Front, number: int, grid: Size | None) -> str:
    """The text for image `number` of a conversation: the overview, then its slices row by row."""
    mark = front.marks
    filler = mark["unk"] * front.num_queries
    overview = mark["im_start"] + filler + mark["im_end"]
    if front.numbers_images:
        overview = f"{mark['im_id_start']}{number}{mark['im_id_end']}" + overview
    if grid is None:
        return overview
    columns, rows = grid
    if front.version == "2.5":
        row = (mark["im_start"] + filler + mark["im_end"]) * columns
        return overview + mark["slice_start"] + "\n".join([row] * rows) + mark["slice_end"]
    row = (mark["slice_start"] + filler + mark["slice_end"]) * columns
    return overview + "\n".join([row] * rows)


def bucket_positions(rows: int, columns: int, side: int) -> Tensor:
    """Rows of a side x side position table for a grid of patches, [rows * columns].

    Patch i of n lies at i/n and takes the cell of the table in which that falls. The steps are
    rounded as torch did it in 2024: float32 reciprocals, boundaries at python floats.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    row, column = (
        torch.bucketize(
            torch.arange(0, 1 - 1e-6, 1 / torch.tensor(n, dtype=torch.int32)),  # type: ignore[call-overload]
            boundaries,
            right=True,
        )
        for n in (rows, columns)
    )
    return (row[:, None] * side + column).flatten()


def read_front(checkpoint: Path, stated: dict[str, Any], version: str) -> Front:
    """Gather the front end's settings; raises CheckpointError where two files disagree."""
    found = read_json(checkpoint / "preprocessor_config.json")
    sliced = stated.get("slice_config") or {}
    tower = SiglipVisionConfig(
        **{k: v for k, v in stated["vision_config"].items() if k != "model_type"},
        vision_use_head=False,
    )
    tower.num_hidden_layers -= bool(stated.get("drop_vision_last_layer", True))
    tower._attn_implementation = "sdpa"
    pairs = [
        ("query_num", stated["query_num"], "image_feature_size"),
        ("vision_config.patch_size", tower.patch_size, "patch_size"),
        ("slice_config.max_slice_nums", sliced.get("max_slice_nums"), "max_slice_nums"),
        ("use_image_id", stated.get("use_image_id"), "use_image_id"),
    ]
    for name, value, other in pairs:
        if None not in (value, found.get(other)) and value != found[other]:
            raise CheckpointError(
                f"{checkpoint}: config.json says {name} {value}, "
                f"preprocessor_config.json says {other} {found[other]}"
            )
    if not (stated.get("slice_mode", True) and found.get("slice_mode", True)):
        raise CheckpointError(f"{checkpoint}: slice_mode false is not supported")
    return Front(
        version=version,
        tower=tower,
        slicing=Slicing(
            max_slices=found.get("max_slice_nums", sliced.get("max_slice_nums", 9)),
            scale_resolution=found.get("scale_resolution", sliced.get("scale_resolution", 448)),
            patch_size=stated["vision_config"]["patch_size"],
            mean=tuple(found.get("norm_mean", (0.5, 0.5, 0.5))),
            std=tuple(found.get("norm_std", (0.5, 0.5, 0.5))),
        ),
        num_queries=stated["query_num"],
        slices_per_batch=stated.get("vision_batch_size", 16),
        encodes_together=stated.get("batch_vision_input", True),
        numbers_images=version != "2.5"
        and found.get("use_image_id", stated.get("use_image_id", True)),
        marks={
            name: found.get(name, default)
            for name, default in {
                "im_start": "<image>",
                "im_end": "</image>",
                "slice_start": "<slice>",
                "slice_end": "</slice>",
                "im_id_start": "<image_id>",
                "im_id_end": "</image_id>",
                "unk": "<unk>",
            }.items()
        },
    )


def _part(prefix: str) -> Any:
    """A rename that keeps the tensors under `prefix` and drops the prefix."""
    return lambda stored: stored.removeprefix(prefix) if stored.startswith(prefix) else None


def _is_padding(slices: Sequence[Slice]) -> Tensor:
    """[S, L], true behind the end of a shorter slice."""
    lengths = torch.tensor([piece.num_patches for piece in slices])
    return torch.arange(int(lengths.max())) >= lengths[:, None]
