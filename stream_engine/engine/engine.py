"""Engine: one loaded model with its cache, its budget and its resolved sampling.

It offers three operations over streams of requests: `generate`, `score`, `next_token_logps`.
Models whose attention the shared prefix cannot reach run through the plain fallback instead, and
say so in `describe()`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from stream_kernels.gemm import linear
from torch import Tensor

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.engine.batching import TokenBudget, map_ahead
from stream_engine.engine.cpu import pack_linears
from stream_engine.engine.decode import STEPS_PER_READ, GraphDecoder, can_capture
from stream_engine.engine.generate import (
    GenerateRequest,
    Generation,
    RequestFailure,
    Scheduler,
    extend_rows,
    prefill_prompts,
)
from stream_engine.engine.parallel import agreed_minimum, load_spread
from stream_engine.engine.plain import plain_generate, plain_next_token_logps, plain_score
from stream_engine.engine.prefix_cache import ATTENTION_NAME, KVCache
from stream_engine.engine.prefixes import SharedPrompt, share_prompt
from stream_engine.engine.sampling import ResolvedSampling, resolve_sampling
from stream_engine.engine.score import (
    NextTokenLogps,
    ScoredContinuations,
    ScoreRequest,
    next_token_logps,
    score,
)
from stream_engine.engine.selftest import check_model
from stream_engine.errors import RecordError
from stream_engine.models import load_model
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.records import EncodedImage

# Tokens of one packed forward, and rows of one decode step, where the user sets no bound.
# CPU: GEMMs are near their peak from some hundred tokens on. Accelerator: beyond about 300 rows
# nothing but launch latency improves.
DEFAULT_TOKENS = {"cpu": 4096, "cuda": 16384}
DEFAULT_ROWS = {"cpu": 160, "cuda": 320}
CPU_CACHE_BYTES = 2 << 30
HOST_THREADS = max(1, min(8, (os.cpu_count() or 2) // 2))


class Engine:
    """Drives one model. Make it with `load_engine`; use it from one thread."""

    def __init__(
        self,
        model: VisionLanguageModel,
        sampling: ResolvedSampling,
        *,
        max_batch_tokens: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        """Put the engine's attention in place and test that the model honours it.

        Raises:
            CheckpointError: when the model is not causal, or yields no finite numbers.
        """
        self.model = model
        self.sampling = sampling
        kind = model.device.type
        self.budget = TokenBudget(
            max_batch_tokens or DEFAULT_TOKENS.get(kind, DEFAULT_TOKENS["cuda"]),
            max_rows or DEFAULT_ROWS.get(kind, DEFAULT_ROWS["cuda"]),
            can_halve=model.tensor_parallel == 1,
        )
        self.counters: Counter[str] = Counter()
        self.stop_token_ids = model.stop_token_ids | _stop_ids(model.generation_defaults)
        self.suppressed = (
            torch.tensor(model.suppressed_token_ids, device=model.device)
            if model.suppressed_token_ids
            else None
        )
        self.max_positions = int(
            getattr(model.backbone.config, "max_position_embeddings", None) or 1 << 30
        )
        self.cache = KVCache(max_prefix_tokens=1 << 30)
        if kind == "cpu" and model.offload is None and model.shares_prefix:
            # recurrent layers read their weights themselves, which a packed one does not allow
            for module in _modules(model):
                pack_linears(module, keep=model.lm_head)
        model.set_attention(ATTENTION_NAME)
        self.self_test = check_model(self)
        self.bytes_per_token = max(1, self.cache.bytes_per_token)
        self.cache.clear()
        self.cache.max_prefix_tokens = self._prefix_limit()
        self.counters.clear()
        self.graphs = GraphDecoder(self) if can_capture(self) and model.shares_prefix else None

    # -- requests --------------------------------------------------------------------------------

    def prepare(
        self, questions: Iterable[tuple[str, str, Sequence[EncodedImage]]]
    ) -> Iterator[tuple[str, Prompt | RecordError]]:
        """Prompts for (key, question, images), in order, made ahead in threads.

        Decoding and preprocessing happen here; what cannot be decoded comes back as a RecordError.
        """

        def make(
            item: tuple[str, str, Sequence[EncodedImage]],
        ) -> tuple[str, Prompt | RecordError]:
            key, question, images = item
            try:
                return key, self.model.prompt(question, [decode_image(i) for i in images])
            except RecordError as error:
                return key, error

        yield from map_ahead(make, questions, threads=HOST_THREADS, ahead=4 * HOST_THREADS)

    def prepare_shared(
        self, questions: Iterable[tuple[str, Sequence[str], Sequence[EncodedImage]]]
    ) -> Iterator[tuple[str, SharedPrompt | RecordError]]:
        """As `prepare`, for (key, several questions, the images they share): one prefix a key."""

        def make(
            item: tuple[str, Sequence[str], Sequence[EncodedImage]],
        ) -> tuple[str, SharedPrompt | RecordError]:
            key, texts, images = item
            try:
                return key, share_prompt(self, texts, [decode_image(i) for i in images])
            except RecordError as error:
                return key, error

        yield from map_ahead(make, questions, threads=HOST_THREADS, ahead=4 * HOST_THREADS)

    @torch.no_grad()
    def generate(
        self, requests: Iterable[GenerateRequest]
    ) -> Iterator[Generation | RequestFailure]:
        """Draw every request's rows; results in order of completion."""
        if self.model.shares_prefix:
            yield from Scheduler(self, requests).run()
        else:
            yield from plain_generate(self, requests)

    @torch.no_grad()
    def score(
        self, requests: Iterable[ScoreRequest]
    ) -> Iterator[ScoredContinuations | RequestFailure]:
        """Log-probs of given continuations; results in order."""
        run = score if self.model.shares_prefix else plain_score
        yield from run(self, requests)

    @torch.no_grad()
    def next_token_logps(
        self, requests: Iterable[ScoreRequest], watched: Sequence[int]
    ) -> Iterator[NextTokenLogps | RequestFailure]:
        """Log-probs of watched tokens after given continuations; results in order."""
        run = next_token_logps if self.model.shares_prefix else plain_next_token_logps
        yield from run(self, requests, watched)

    # -- what the parts call ---------------------------------------------------------------------

    def prefill(self, prompts: Sequence[Prompt], starts: Sequence[int]) -> Tensor:
        return prefill_prompts(self, prompts, starts)

    def extend(
        self,
        groups: Sequence[tuple[Prompt, tuple[int, int], Sequence[Sequence[int]]]],
        slots: Sequence[int] | None = None,
    ) -> Tensor:
        return extend_rows(self, groups, slots)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [R, V] of hidden states [R, D], scaled and capped as the model says."""
        head = self.model.lm_head
        self.counters["head_rows"] += len(hidden)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
            if head.bias is not None:
                logits += head.bias
        else:
            logits = linear(hidden, head.weight, head.bias).float()
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
                f"{longest} positions, the model has {self.max_positions}",
            )
        window = self.cache.sliding_window
        if window is not None and longest + self.sampling.max_new_tokens > window:
            return (
                "prompt_too_long",
                f"{longest} positions and {self.sampling.max_new_tokens} new tokens exceed the "
                f"model's sliding window of {window}",
            )
        return None

    def plan_generation(self) -> None:
        """On a GPU, fix the cache's sizes and the rows that fit, before the first decode step.

        A slot must hold a whole answer. 60 % of the memory free at the first call goes to the
        cache (the rest is for activations and the other model's cache), three quarters of that
        to slots, and the remainder to prefixes.
        """
        if self.graphs is None or self.cache.num_slots > self.budget.rows:
            return
        self.cache.clear()
        free, _ = torch.cuda.mem_get_info(self.model.device)
        tokens = int(0.6 * free) // self.bytes_per_token
        slot_tokens = self.sampling.max_new_tokens + STEPS_PER_READ
        rows = max(1, min(self.budget.rows, 3 * tokens // (4 * slot_tokens)))
        self.budget.max_rows = max(1, int(rows / self.budget.scale))
        self.cache.max_prefix_tokens = max(4096, min(tokens - rows * slot_tokens, 256 * rows))
        self.cache.preallocate(
            prefix_tokens=self.cache.max_prefix_tokens, slots=rows + 1, slot_tokens=slot_tokens
        )

    def free_memory(self) -> None:
        """Give up the cache after out-of-memory."""
        self.cache.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the model's memory; the engine is of no use afterwards."""
        self.cache.clear()
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """What runs, in plain values, for run.json and the printed plan."""
        model = self.model
        return {
            "checkpoint": str(model.checkpoint),
            "family": model.family,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes": sum(_num_bytes(p) for p in _parameters(model)),
            "tensor_parallel": model.tensor_parallel,
            "offload": model.offload,
            "attention": "shared prefix" if model.shares_prefix else "plain",
            "self_test": self.self_test,
            "max_tokens": self.budget.max_tokens,
            "max_rows": self.budget.max_rows,
            "max_prefix_tokens": self.cache.max_prefix_tokens,
            "sampling": {
                name: getattr(self.sampling, name)
                for name in self.sampling.__struct_fields__
                if name != "sources"
            },
            "sampling_sources": self.sampling.sources,
            "stop_token_ids": sorted(self.stop_token_ids),
        }

    def _prefix_limit(self) -> int:
        """Prefix tokens that fit: half of what is free on the device, or a fixed share of RAM."""
        per_token = self.bytes_per_token
        if self.model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.model.device)
            if self.model.tensor_parallel > 1:
                free = agreed_minimum(free)
            return max(4096, int(free * 0.4) // per_token)
        return max(4096, CPU_CACHE_BYTES // per_token)


def load_engine(role: ModelRole, config: ModelConfig, sampling: SamplingConfig) -> Engine:
    """Load a role's checkpoint and make it ready; the role's own sampling wins over the run's.

    Raises:
        CheckpointError: with the file or tensor at fault.
        ConfigError: when it cannot be split over ranks or offloaded as the settings say.
    """
    is_spread = config.tensor_parallel > 1 or config.offload is not None
    load = load_spread if is_spread else load_model
    model = load(role.path, config, name_hint=role.hint)
    return Engine(
        model,
        resolve_sampling(role.sampling or sampling, model.generation_defaults),
        max_batch_tokens=config.max_batch_tokens,
        max_rows=config.max_rows,
    )


def decode_image(image: EncodedImage) -> Image.Image:
    """Decode an image fully. Raises RecordError("undecodable_image") where Pillow cannot."""
    try:
        decoded = Image.open(BytesIO(image.data))
        decoded.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecordError("undecodable_image", f"{image.path}: {error}") from error
    return decoded


def _stop_ids(generation_defaults: dict[str, Any]) -> frozenset[int]:
    eos = generation_defaults.get("eos_token_id")
    return frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])


def _num_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter, also while it is offloaded (DeepSpeed then keeps its size aside)."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.itemsize


def _parameters(model: VisionLanguageModel) -> list[torch.nn.Parameter]:
    """Every parameter once, of every module the model holds."""
    return list({id(p): p for m in _modules(model) for p in m.parameters()}.values())


def _modules(model: VisionLanguageModel) -> list[torch.nn.Module]:
    return [m for m in vars(model).values() if isinstance(m, torch.nn.Module)]
