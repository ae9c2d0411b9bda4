"""ModelRunner: one loaded model with its cache, its token budget and its head.

The steps above it (draw, decode, score, plain) ask it for hidden states and logits, and for memory
when that has run out. It knows no request and no schedule.

Legend: P prompts, N packed tokens, R rows, D hidden, V columns of the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from stream_kernels.forms import takes_triton
from stream_kernels.gemm import linear, linear_float32, pack_for_float32
from torch import Tensor

from stream_engine.engine.attention_steps import ExtendStep, PrefillStep, active
from stream_engine.engine.batching import TokenBudget
from stream_engine.engine.cpu import keep_freed_memory, pack_linears
from stream_engine.engine.fused_layers import fuse_layers
from stream_engine.engine.memory import DEFAULT_ROWS, DEFAULT_TOKENS
from stream_engine.engine.prefix_cache import KVCache
from stream_engine.engine.sampling import ResolvedSampling
from stream_engine.engine.seen import SeenTokens
from stream_engine.errors import CheckpointError
from stream_engine.models.base import Prompt, VisionLanguageModel


class ModelRunner:
    """A model, and what running it takes. Use it from one thread."""

    def __init__(
        self,
        model: VisionLanguageModel,
        sampling: ResolvedSampling,
        *,
        max_batch_tokens: int | None = None,
        max_rows: int | None = None,
        rows_per_question: int = 1,
    ) -> None:
        self.model = model
        self.sampling = sampling
        kind = model.device.type
        self.budget = TokenBudget(
            max_batch_tokens or DEFAULT_TOKENS.get(kind, DEFAULT_TOKENS["cuda"]),
            max_rows or DEFAULT_ROWS.get(kind, DEFAULT_ROWS["cuda"]),
            can_halve=model.tensor_parallel == 1,
        )
        self.rows_per_question = rows_per_question
        self.counters: Counter[str] = Counter()
        self.stop_token_ids = model.stop_token_ids | _stop_ids(model)
        self.suppressed = (
            torch.tensor(model.suppressed_token_ids, device=model.device)
            if model.suppressed_token_ids
            else None
        )
        self.max_positions = max_positions(model.backbone.config)
        self.cache = KVCache(max_prefix_tokens=1 << 30)
        self.seen = (
            SeenTokens(self.cache, model.lm_head.weight.shape[0], model.device)
            if sampling.repetition_penalty != 1.0
            else None
        )
        self.drop_early: Callable[[], bool] = lambda: False
        """Gives up what was begun for a later call; returns whether that freed memory of the
        cache. Set by who schedules."""
        self.drop_captures: Callable[[], None] = lambda: None
        """Gives up captured steps, which hold addresses of the cache. Set by who captures."""
        self.drop_plan: Callable[[], None] = lambda: None
        """Lets the memory plan be made anew. Set by who plans."""
        self._prepare_device()
        self.head_weight = self._head_weight()
        self.head_is_exact = model.offload is None and self.head_weight.dtype == torch.bfloat16

    def _prepare_device(self) -> None:
        model = self.model
        if model.device.type == "cuda":
            # cuDNN's attention makes a plan for every new length and stride of a prompt, which
            # takes longer than the prompt does; flash attention takes any.
            torch.backends.cuda.enable_cudnn_sdp(False)
            # Float32 convolutions (a tower's patches) would be rounded to 10 bits, as torch allows
            # by default for them, though not for matrix products.
            torch.backends.cudnn.allow_tf32 = False
        elif model.device.type == "cpu" and not takes_triton(model.device):  # nor in a rehearsal
            keep_freed_memory()
            # recurrent layers read their weights themselves, which a packed one does not allow
            if model.offload is None and model.shares_prefix:
                for module in _modules(model):
                    pack_linears(module, keep=model.lm_head)
                if model.tensor_parallel == 1:
                    fuse_layers(model.backbone)

    def _head_weight(self) -> Tensor:
        """The head's weight as decoding reads it; scoring reads slices of the plain one.

        On CPU a float32 copy of a shorter format, so that the log-probs that fall out of generation
        are as exact as those of scoring, and in oneDNN's layout where that is in use. Where
        products in bfloat16 are as exact and faster, the weight keeps its format.
        """
        weight = self.model.lm_head.weight
        if weight.device.type != "cpu" or self.model.offload is not None:
            return weight
        if not self.model.shares_prefix:
            return weight.float()
        return pack_for_float32(weight)

    def prefill(self, prompts: Sequence[Prompt], starts: Sequence[int]) -> Tensor:
        """Encode the images and prefill the prompts into their spans; last hidden states [P, D]."""
        spans = [(start, len(prompt)) for start, prompt in zip(starts, prompts)]
        features = self.model.encode_images(prompts)
        with active(PrefillStep(self.cache, spans)):
            hidden = self.model.prefill(prompts, features)
        self.counters["prompts"] += len(prompts)
        self.counters["prompt_tokens"] += sum(map(len, prompts))
        return hidden

    def extend(
        self,
        groups: Sequence[tuple[Prompt, tuple[int, int], Sequence[Sequence[int]]]],
        slots: Sequence[int] | None = None,
    ) -> Tensor:
        """Run rows of own tokens over their prefixes; hidden states [N, D] of all, packed in order.

        `groups` holds (prompt, its span, the rows' tokens); every row has at least one token.
        """
        device = self.model.device
        step = ExtendStep(
            self.cache, [(span, [len(row) for row in rows]) for _, span, rows in groups], slots
        )
        ids = torch.tensor([i for _, _, rows in groups for row in rows for i in row], device=device)
        positions = torch.cat(
            [
                torch.arange(prompt.next_position, prompt.next_position + len(row))
                for prompt, _, rows in groups
                for row in rows
            ]
        ).to(device)
        with active(step):
            hidden = self.model.forward(self.model.embed(ids), positions)
        self.counters["suffix_tokens"] += len(ids)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [R, V] of hidden states [R, D], scaled and capped as the model says."""
        head = self.model.lm_head
        self.counters["head_rows"] += len(hidden)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
            if head.bias is not None:
                logits += head.bias
        elif self.head_is_exact and not hidden.is_cuda:
            logits = linear_float32(hidden, self.head_weight, head.bias)
        else:
            dtype = self.head_weight.dtype
            bias = None if head.bias is None else head.bias.to(dtype)
            logits = linear(hidden.to(dtype), self.head_weight, bias).float()
        if self.model.logit_scale != 1.0:
            logits *= self.model.logit_scale
        if self.model.logit_softcap is not None:
            logits = self.model.logit_softcap * torch.tanh(logits / self.model.logit_softcap)
        return logits

    def refusal(self, prompt: Prompt, longest_suffix: int) -> tuple[str, str] | None:
        """(reason, detail) when a prompt does not fit this model, else None."""
        longest = len(prompt) + longest_suffix + 1
        if longest > self.max_positions:
            return (
                "prompt_too_long",
                f"{longest} positions, {len(prompt)} of them the prompt's; the model is run with "
                f"{self.max_positions} at most",
            )
        window = self.cache.sliding_window
        if window is not None and longest + self.sampling.max_new_tokens > window:
            return (
                "prompt_too_long",
                f"{longest} positions and {self.sampling.max_new_tokens} new tokens exceed the "
                f"model's sliding window of {window}",
            )
        return None

    def count(self, **numbers: int) -> None:
        """Add to the counters."""
        self.counters.update(numbers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's parameters."""
        return sum(_num_bytes(p) for p in _parameters(self.model))

    @property
    def is_busy(self) -> bool:
        """Whether the cache holds anything that is in use."""
        cache = self.cache
        return cache.spans.num_free < cache.spans.capacity or cache.num_used_slots > 0

    def free_memory(self) -> None:
        """Give up the cache after out-of-memory; the next generation plans anew."""
        self.drop_plan()
        self.drop_early()
        self.clear_cache()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def clear_cache(self) -> None:
        """Free the cache, and the captured steps that hold its addresses."""
        self.cache.clear()
        self.drop_captures()


class HasPrompt(Protocol):
    """A request for tokens after a prompt."""

    @property
    def prompt(self) -> Prompt: ...


def release_prompts(cache: KVCache, admitted: Iterable[tuple[HasPrompt, int]]) -> None:
    """Free the spans of requests' prompts, each given with its span's start."""
    for request, start in admitted:
        cache.release_span(start, len(request.prompt))


def max_positions(config: Any) -> int:
    """How many positions a language model is run with, from its configuration.

    Where "longrope" takes other rotary factors for longer texts, the fewer: transformers chooses
    one set for a whole forward, by the largest position in it, so that beyond these a row would
    change the log-probs of every row beside it, and of its own tokens before.
    """
    limits = [int(getattr(config, "max_position_embeddings", None) or 1 << 30)]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one set for all layers, or one a kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min(limits)


def _stop_ids(model: VisionLanguageModel) -> frozenset[int]:
    eos = model.generation_defaults.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(
            f"{model.checkpoint}: generation_config.json's eos_token_id is {eos!r}; it is the "
            "number of a token, or a list of such"
        )
    return frozenset(ids)


def _num_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter, also while it is offloaded (DeepSpeed then keeps its size aside)."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.itemsize


def _parameters(model: VisionLanguageModel) -> list[torch.nn.Parameter]:
    """Every parameter once, of every module the model holds."""
    return list({id(p): p for m in _modules(model) for p in m.parameters()}.values())


def _modules(model: VisionLanguageModel) -> list[torch.nn.Module]:
    return [m for m in vars(model).values() if isinstance(m, torch.nn.Module)]
