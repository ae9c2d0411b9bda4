"""VisionLanguageModel: the few things that differ between families. The engine drives the rest.

A family is a front end (images -> feature rows), a chat template, and a *native* transformers
language model. The engine calls, for every question exactly once and in this order:

    prompt = model.ask(question, images)               # host: ids, preprocessed pixels, digests
    features = model.encode_images([prompt, ...])      # vision tower, on batches of questions
    hidden = model.prefill([prompt, ...], features)    # language model, prompts packed in one row

and then `embed`, `text_positions` and `backbone` for every further token. All forwards of the
language model are *packed*: inputs_embeds is [1, N, D] with several sequences one after the other,
position_ids say where each token stands, and the attention function registered by the engine knows
the boundaries. A family therefore never builds a mask and never pads.

This module knows nothing of shards, pipelines or caches.

Legend: N tokens, D hidden, V vocabulary, P prompts.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stream_engine.errors import RecordError
from stream_engine.records import PromptDigest, prompt_parts, without_marks

if TYPE_CHECKING:
    from PIL.Image import Image

NOTHING = r"(?!)"
"""A pattern that nothing matches."""

IMAGE_SLOT = -200
"""Stands in `Prompt.ids` at every position that an image feature fills (LLaVA's own sentinel)."""


@dataclass
class Prompt:
    """A question as one model will see it. Lives on the host; pixels are preprocessed.

    `ids` has one entry per position of the language model: a token id, or IMAGE_SLOT where an
    image feature goes (families whose own code places the features keep their image token's id).
    `vision` is the family's own: whatever `encode_images` or `prefill` needs.
    `next_position` is the rotary position of the first token after the prompt; `prefill` may
    correct it (M-RoPE).
    """

    ids: list[int]
    digest: PromptDigest
    vision: Any = None
    next_position: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_position = len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class VisionLanguageModel(ABC):
    """One loaded checkpoint. `load_model` makes it; see the module header for the calls."""

    family: ClassVar[str]

    checkpoint: Path
    tokenizer: Any  # a transformers tokenizer
    backbone: nn.Module
    """The language model without its head: (inputs_embeds [1, N, D], position_ids) -> an output
    with `.last_hidden_state` [1, N, D]. Families load it with `own_attention`; the engine then
    calls `set_attention` to put its own function in place."""
    lm_head: nn.Linear
    vocab_size: int
    """Rows of the head that take part in the softmax (rows added by converters do not)."""
    stop_token_ids: frozenset[int]
    suppressed_token_ids: tuple[int, ...] = ()
    """Ids that may never be sampled (image placeholders)."""
    generation_defaults: dict[str, Any]
    """What the checkpoint's generation_config.json says, as it stands there; {} without one."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    own_attention: str = "sdpa"
    """The attention this model was loaded with, for what the engine's own cannot do."""
    shares_prefix: bool = True
    """Whether the engine's attention function reaches every layer. A self-test checks it."""
    tensor_parallel: int = 1
    """Over how many ranks the backbone's layers are split; see engine/parallel.py."""
    places_images: bool = True
    """Whether pictures are seen where the question's marks stand; else all of them come first."""
    turn_marks: tuple[str, ...] = ()
    """Plain words by which the chat template tells turns apart ("USER:"), where it uses such."""
    offload: str | None = None
    """Where the backbone's layers lie between forwards, when it is not the device."""

    def ask(self, question: str, images: Sequence[Image]) -> Prompt:
        """The prompt of a user's question: its marks are where the pictures stand.

        Raises:
            RecordError: "control_token", where the question spells one, and as `prompt` does.
        """
        asked = self.asked(question, len(images))
        for part in prompt_parts(asked, len(images)):
            refuse(self._control_texts, part or "")
            refuse(self._turn_words, part or "")
        return self.prompt(asked, images)

    def ask_plainly(self, text: str, images: Sequence[Image]) -> Prompt:
        """The prompt of a text of ours about pictures that come first, whatever marks it quotes.

        Raises:
            RecordError: as `ask`, but for the template's plain words: a judge's own text may hold
                these.
        """
        text = without_marks(text)
        refuse(self._control_texts, text)
        return self.prompt(text, images)

    def asked(self, question: str, num_images: int) -> str:
        """The question as this model is asked it: the same, or with its pictures put first."""
        return question if self.places_images else without_marks(question)

    @functools.cached_property
    def _control_texts(self) -> re.Pattern[str]:
        """What the tokenizer would make control tokens of."""
        tokens = sorted(self.control_texts(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or NOTHING)

    @functools.cached_property
    def _turn_words(self) -> re.Pattern[str]:
        """What could forge a turn in plain words."""
        return re.compile("|".join(rf"(?<!\w){re.escape(m)}" for m in self.turn_marks) or NOTHING)

    def control_texts(self) -> set[str]:
        """What the tokenizer reads as one token with a meaning of its own, as text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special}
        special |= set(getattr(self.tokenizer, "all_special_tokens", ()))
        return {text for text in special if len(text) > 2}  # some name "!" or a space

    @abstractmethod
    def prompt(self, question: str, images: Sequence[Image]) -> Prompt:
        """The generation prompt for a question about `images` (decoded, any mode or size), as
        `asked` gives it and without control tokens.

        The prompt ends where the answer's first token begins. Raises RecordError
        ("too_many_images", "prompt_too_long" ...) for what this family cannot take.
        """

    @abstractmethod
    def encode_images(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Feature rows [number of image positions, D] for each prompt; None without images."""

    def set_attention(self, implementation: str) -> None:
        """Select a function of transformers' attention registry for the language model alone."""
        self.backbone.config._attn_implementation = implementation  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., D] of ids [...]."""
        embedding = self.backbone.get_input_embeddings()  # type: ignore[operator]
        return embedding(ids)

    def assemble(self, prompt: Prompt, features: Tensor | None) -> Tensor:
        """Embeddings [len(prompt), D] with the image features in their places.

        Raises:
            AssertionError: when the number of features is not the number of image positions.
        """
        ids = torch.tensor(prompt.ids, device=self.device)
        is_image = ids == IMAGE_SLOT
        embeds = self.embed(ids.masked_fill(is_image, 0))
        num_slots = int(is_image.sum())
        num_features = 0 if features is None else features.shape[0]
        assert num_slots == num_features, f"{num_features} features for {num_slots} image positions"
        if features is not None:
            embeds[is_image] = features.to(embeds.dtype)
        return embeds

    def prefill(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> Tensor:
        """Run the prompts through the language model; the last hidden state of each, [P, D].

        The default packs them in one row. Families whose own code must place the features (or
        compute other positions) override it, calling the language model once per prompt in order.
        """
        embeds = torch.cat([self.assemble(p, f) for p, f in zip(prompts, features)])
        positions = torch.cat([torch.arange(len(p), device=self.device) for p in prompts])
        hidden = self.forward(embeds, positions)
        ends = torch.tensor([len(p) for p in prompts], device=self.device).cumsum(0) - 1
        return hidden[ends]

    def forward(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Packed tokens [N, D] at rotary positions [N] -> hidden states [N, D]."""
        output = self.backbone(
            inputs_embeds=embeds[None],
            position_ids=self.text_positions(positions[None]),
            use_cache=False,
        )
        return output.last_hidden_state[0]

    def prefill_cached(self, prompt: Prompt, features: Tensor | None, cache: Any) -> Tensor:
        """Like `prefill` of one prompt, into a transformers cache: its last hidden state [D].

        For models whose layers the engine's attention cannot reach.
        """
        embeds = self.assemble(prompt, features)
        positions = torch.arange(len(prompt), device=self.device)[None]
        return self.extend_cached(embeds[None], positions, cache)[0, -1]

    def extend_cached(self, embeds: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """New tokens [R, A, D] at positions [R, A] after what a cache holds: hidden [R, A, D]."""
        output = self.backbone(
            inputs_embeds=embeds,
            position_ids=self.text_positions(positions),
            use_cache=True,
            **{cache_argument(type(self.backbone)): cache},
        )
        return output.last_hidden_state

    def text_positions(self, positions: Tensor) -> Tensor:
        """Position ids of text tokens as the backbone wants them, from [R, N] scalars."""
        return positions

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text` as it stands inside an answer or prompt: no special tokens added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer whose text alone is known, without an end token.

        Raises:
            RecordError: "control_token", where the text spells one.
        """
        refuse(self._control_texts, text, what="an answer")
        return self.encode_text(text)

    def end_token_id(self, stop_token_ids: Collection[int]) -> int:
        """The one of these that stands behind a whole answer."""
        likely = [*self.closing_ids(), self.tokenizer.eos_token_id, *sorted(stop_token_ids)]
        return next(token_id for token_id in likely if token_id in stop_token_ids)

    def closing_ids(self) -> list[int]:
        """What the chat template puts behind an answer, where that is not the tokenizer's own end
        token."""
        return []

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer's text: special tokens skipped, surrounding white space stripped."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    def digest(self, ids: Sequence[int], pixels: Tensor | Sequence[Tensor] | None) -> PromptDigest:
        """Hashes of what the model sees, to refuse subtracting log-probs of different prompts."""
        image_hash = hashlib.blake2b(digest_size=8)
        for tensor in [] if pixels is None else [pixels] if isinstance(pixels, Tensor) else pixels:
            image_hash.update(content_hash(tensor))
        return PromptDigest(
            ids=hashlib.blake2b(",".join(map(str, ids)).encode(), digest_size=8).hexdigest(),
            pixels=image_hash.hexdigest(),
            tokenizer=self.tokenizer_digest(),
        )

    def tokenizer_digest(self) -> str:
        """Hash of the vocabulary: equal exactly when ids below `vocab_size` mean the same."""
        if not hasattr(self, "_tokenizer_digest"):
            vocabulary = self.tokenizer.get_vocab().items()
            entries = sorted((i, token) for token, i in vocabulary if i < self.vocab_size)
            digest = hashlib.blake2b(repr(entries).encode(), digest_size=8).hexdigest()
            self._tokenizer_digest = digest
        return self._tokenizer_digest


def refuse(pattern: re.Pattern[str], text: str, *, what: str = "the question") -> None:
    """Raise RecordError for a text that holds what has a meaning beyond its words."""
    if found := pattern.search(text):
        raise RecordError(
            "control_token", f"{what} holds {found[0]!r}, which means more than its text"
        )


def cache_argument(model: type) -> str:
    """What a transformers model's forward calls its cache: `past_key_values`, or `cache` in newer
    releases, which warn of the former name."""
    names = argument_names(model.forward)  # type: ignore[attr-defined]
    return "cache" if "cache" in names else "past_key_values"


@functools.cache  # asked at each step
def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def content_hash(tensor: Tensor) -> bytes:
    """Hash of a tensor's shape and values; the tensor carries it on, for further prompts."""
    known: bytes | None = getattr(tensor, "_content_hash", None)
    if known is None:
        digest = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=8)
        digest.update(tensor.contiguous().float().numpy().tobytes())
        known = tensor._content_hash = digest.digest()  # type: ignore[attr-defined]
    return known
