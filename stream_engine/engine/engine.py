"""Engine: one loaded model with its cache, its budget and its resolved sampling.

It offers three operations over streams of requests: `generate`, `score`, `next_token_logps`.
Models whose attention the shared prefix cannot reach run through the plain fallback instead, and
say so in `describe()`.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any, TypeVar

import torch
from PIL import Image
from stream_kernels.gemm import linear, pack
from torch import Tensor

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.batching import TokenBudget, map_ahead
from stream_engine.engine.cpu import keep_freed_memory, pack_linears
from stream_engine.engine.decode import STEPS_PER_READ, GraphDecoder, can_capture
from stream_engine.engine.draw import SeenTokens
from stream_engine.engine.generate import (
    GenerateRequest,
    Generation,
    RequestFailure,
    Scheduler,
    extend_rows,
    prefill_prompts,
)
from stream_engine.engine.memory import (
    DEFAULT_ROWS,
    DEFAULT_TOKENS,
    PENALTY_COPIES,
    Demand,
    MemoryPlan,
    host_available,
    language_shape,
    plan_memory,
    share_out,
    wanted_bytes,
)
from stream_engine.engine.parallel import agreed_minimum, load_spread
from stream_engine.engine.plain import plain_generate, plain_next_token_logps, plain_score
from stream_engine.engine.prefix_cache import ATTENTION_NAME, KVCache
from stream_engine.engine.prefixes import SharedPrompt, share_prompt
from stream_engine.engine.rehearsal import rehearse, typical_prompt
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
from stream_engine.pictures import check_depth, upright
from stream_engine.ranks import Rank
from stream_engine.records import EncodedImage

SMALLER = 0.85
"""A plan that did not hold is made anew for this share of the memory."""
HOST_THREADS = max(1, min(8, (os.cpu_count() or 2) // 2))

MadeT = TypeVar("MadeT")

logger = logging.getLogger(__name__)


class Engine:
    """Drives one model. Make it with `load_engine`; use it from one thread."""

    def __init__(
        self,
        model: VisionLanguageModel,
        sampling: ResolvedSampling,
        *,
        max_batch_tokens: int | None = None,
        max_rows: int | None = None,
        rows_per_question: int = 1,
        draws: bool = True,
    ) -> None:
        """Put the engine's attention in place and test that the model honours it.

        `rows_per_question` and `draws` (False: it will only score) shape the memory plan alone.

        Raises:
            CheckpointError: when the model is not causal, or yields no finite numbers.
            ConfigError: when the memory that is free does not hold one answer.
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
        self.max_positions = max_positions(model.backbone.config)
        self.cache = KVCache(max_prefix_tokens=1 << 30)
        self.scheduler = Scheduler(self)
        self.seen = (
            SeenTokens(self.cache, model.lm_head.weight.shape[0], model.device)
            if sampling.repetition_penalty != 1.0
            else None
        )
        if kind == "cuda":
            # cuDNN's attention makes a plan for every new length and stride of a prompt, which
            # takes longer than the prompt does; flash attention takes any.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if kind == "cpu":
            keep_freed_memory()
            # recurrent layers read their weights themselves, which a packed one does not allow
            if model.offload is None and model.shares_prefix:
                for module in _modules(model):
                    pack_linears(module, keep=model.lm_head)
        self.head_weight = self._head_weight()
        model.set_attention(ATTENTION_NAME)
        self.self_test = check_model(self)
        self.bytes_per_token = max(1, self.cache.bytes_per_token)
        self.cache.clear()
        self.counters.clear()
        self.graphs = GraphDecoder(self) if can_capture(self) and model.shares_prefix else None
        self.draws = draws
        self.rows_per_question = rows_per_question
        self.bounds = (self.budget.max_tokens, self.budget.max_rows)
        self.slot_tokens = sampling.max_new_tokens + STEPS_PER_READ
        self.prompt_tokens = len(typical_prompt(self)) if model.shares_prefix else 0
        self.allowance: int | None = None
        """Bytes beside the weights that this engine may take; None: all that is free."""
        self.plan: MemoryPlan | None = None
        self.is_planned = False
        self.rehearses = kind == "cuda" and model.tensor_parallel == 1
        """Whether a plan is tried at full size before it is used."""
        if model.shares_prefix and self.rehearses:  # other models may yet be loaded beside it
            self._adopt(plan_memory(self.demand(), self.available(), weights=self._weights()))
        else:
            self.plan_memory()

    # -- requests --------------------------------------------------------------------------------

    def prepare(
        self, questions: Iterable[tuple[str, str, Sequence[EncodedImage]]]
    ) -> Iterator[tuple[str, Prompt | RecordError]]:
        """Prompts for (key, question, images), in order, made ahead in threads.

        Decoding and preprocessing happen here; what cannot be decoded, or does not fit the host's
        memory, comes back as a RecordError.
        """

        def make(
            item: tuple[str, str, Sequence[EncodedImage]],
        ) -> tuple[str, Prompt | RecordError]:
            key, question, images = item
            return key, or_record_error(
                lambda: self.model.prompt(question, [decode_image(i) for i in images])
            )

        yield from map_ahead(make, questions, threads=HOST_THREADS, ahead=4 * HOST_THREADS)

    def prepare_shared(
        self, questions: Iterable[tuple[str, Sequence[str], Sequence[EncodedImage]]]
    ) -> Iterator[tuple[str, SharedPrompt | RecordError]]:
        """As `prepare`, for (key, several questions, the images they share): one prefix a key."""

        def make(
            item: tuple[str, Sequence[str], Sequence[EncodedImage]],
        ) -> tuple[str, SharedPrompt | RecordError]:
            key, texts, images = item
            return key, or_record_error(
                lambda: share_prompt(self, texts, [decode_image(i) for i in images])
            )

        yield from map_ahead(make, questions, threads=HOST_THREADS, ahead=4 * HOST_THREADS)

    @torch.no_grad()
    def generate(
        self, requests: Iterable[GenerateRequest], ahead: Iterable[GenerateRequest] = ()
    ) -> Iterator[Generation | RequestFailure]:
        """Draw every request's rows; results in order of completion.

        `ahead` are requests of the next call, read and begun when this one leaves rows free.
        """
        if self.model.shares_prefix:
            # A call inside another's (one role asks what another has just said) looks not ahead.
            inner = self.scheduler.is_running
            yield from (Scheduler(self) if inner else self.scheduler).run(requests, ahead)
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
                f"{longest} positions, the model is run with {self.max_positions} at most",
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
        """Before the first decode step: the largest batch that fits, tried on an accelerator.

        Called again after out-of-memory, when the budget bounds it lower. Raises ConfigError when
        nothing fits.
        """
        if not (self.is_planned and self.draws):
            self.draws = True
            self.plan_memory()

    def plan_memory(self) -> None:
        """Compute the plan from what is free now, and confirm it; smaller until it holds.

        Raises:
            ConfigError: when nothing fits.
        """
        if not self.model.shares_prefix:
            return
        self.clear_cache()
        demand, available = self.demand(), self.available()
        while True:
            plan = plan_memory(demand, available, weights=self._weights())
            if self._holds(plan):
                break
            available = int(SMALLER * available)
        self.is_planned = True

    def demand(self) -> Demand:
        """What this engine asks of memory, in numbers learnt from the loaded model."""
        model, budget = self.model, self.budget
        config: Any = model.backbone.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocab, hidden = model.lm_head.weight.shape
        itemsize = model.dtype.itemsize
        on_cuda = model.device.type == "cuda"
        copies = 1.0 + 2 * (model.logit_softcap is not None)
        if self.seen is not None:
            copies += PENALTY_COPIES
        if not on_cuda and itemsize != 4:
            copies += itemsize / 4
        return Demand(
            shape=language_shape(
                text, itemsize=itemsize, vocab=vocab, hidden=hidden, parts=model.tensor_parallel
            ),
            kv_bytes=self.bytes_per_token,
            rows=budget.rows if self.draws else 0,
            tokens=budget.tokens,
            slot_tokens=self.slot_tokens,
            prompt_tokens=self.prompt_tokens,
            rows_per_question=self.rows_per_question,
            logit_copies=copies,
            device=model.device.type,
            grows=not on_cuda,
            graphs=self.graphs is not None,
        )

    @property
    def is_busy(self) -> bool:
        """Whether the cache holds anything that is in use."""
        cache = self.cache
        return cache.spans.num_free < cache.spans.capacity or cache.num_used_slots > 0

    def available(self) -> int:
        """Bytes free for this engine; ranks that hold a model together agree on the least."""
        free = free_bytes(self.model.device, ranks=Rank.from_environment().local_world_size)
        if self.model.tensor_parallel > 1:
            free = agreed_minimum(free)
        return free if self.allowance is None else min(free, self.allowance)

    def still_to_take(self) -> int:
        """Bytes that the plan allows and that are not allocated yet."""
        assert self.plan is not None
        return max(0, self.plan.total - self.plan.reserve - self.cache.num_bytes)

    def _holds(self, plan: MemoryPlan) -> bool:
        """Confirm a plan: by its largest steps on an accelerator, against what is free on CPU.

        Ranks that hold a model together try nothing: one that fails leaves the others waiting.
        """
        self._adopt(plan)
        if not self.rehearses:
            confirmed = self.model.device.type != "cuda" and plan.total <= self.available()
            self.plan = replace(plan, confirmed=confirmed)
            if self.model.device.type == "cuda":
                self._preallocate(plan)
            return confirmed or self.model.tensor_parallel > 1
        try:
            self._preallocate(plan)
            rehearse(self, plan)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if is_device_lost(error):
                raise
            self.free_memory()
            if is_out_of_memory(error):
                logger.info("%d rows did not fit, trying fewer", plan.rows)
                return False
            logger.warning("the memory plan could not be tried: %s", error)
            self._preallocate(plan)
        else:
            self.plan = replace(plan, confirmed=True)
        return True

    def _preallocate(self, plan: MemoryPlan) -> None:
        """Fix the slabs at the plan's size, so that captured steps keep their addresses."""
        self.cache.preallocate(
            prefix_tokens=plan.prefix_tokens,
            slots=plan.rows + 1 if plan.rows else 0,
            slot_tokens=plan.slot_tokens if plan.rows else 0,
        )

    def _adopt(self, plan: MemoryPlan) -> None:
        """Let budget and cache follow a plan."""
        budget = self.budget
        self.plan = plan
        self.cache.max_prefix_tokens = plan.prefix_tokens
        budget.max_tokens = max(1, int(plan.prefill_tokens / budget.scale))
        if plan.rows:
            budget.max_rows = max(1, int(plan.rows / budget.scale))

    def _weights(self) -> int:
        return sum(_num_bytes(p) for p in _parameters(self.model))

    def free_memory(self) -> None:
        """Give up the cache after out-of-memory; the next generation plans anew."""
        if self.model.device.type == "cuda":  # rows with long prompts of their own made it larger
            self.slot_tokens = max(self.slot_tokens, self.cache.slot_capacity)
        self.is_planned = False
        self.scheduler.forget()
        self.clear_cache()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def clear_cache(self) -> None:
        """Free the cache, and the captured steps that hold its addresses."""
        self.cache.clear()
        if self.graphs is not None:
            self.graphs.forget()

    def close(self) -> None:
        """Free the model's memory; the engine is of no use afterwards."""
        self.clear_cache()
        del self.model, self.head_weight, self.graphs, self.seen
        gc.collect()  # the engine and its parts refer to each other
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
            "bytes": self._weights(),
            "tensor_parallel": model.tensor_parallel,
            "offload": model.offload,
            "attention": "shared prefix" if model.shares_prefix else "plain",
            "self_test": self.self_test,
            "max_tokens": self.budget.max_tokens,
            "max_rows": self.budget.max_rows,
            "max_prefix_tokens": self.cache.max_prefix_tokens,
            "memory": None if self.plan is None else self.plan.to_dict(),
            "sampling": {
                name: getattr(self.sampling, name)
                for name in self.sampling.__struct_fields__
                if name not in ("sources", "notes")
            },
            "sampling_sources": self.sampling.sources,
            "sampling_notes": list(self.sampling.notes),
            "stop_token_ids": sorted(self.stop_token_ids),
        }

    def _head_weight(self) -> Tensor:
        """The head's weight as decoding reads it; scoring reads slices of the plain one.

        On CPU a float32 copy of a shorter format, so that the log-probs that fall out of generation
        are as exact as those of scoring, and in oneDNN's layout where that is in use.
        """
        weight = self.model.lm_head.weight
        if weight.device.type != "cpu" or self.model.offload is not None:
            return weight
        return pack(weight.float()) if self.model.shares_prefix else weight.float()


def load_engine(role: ModelRole, config: ModelConfig, sampling: SamplingConfig) -> Engine:
    """Load a role's checkpoint and make it ready; the role's own sampling wins over the run's.

    Raises:
        CheckpointError: with the file or tensor at fault.
        ConfigError: when it cannot be split over ranks or offloaded as the settings say.
    """
    is_spread = config.tensor_parallel > 1 or config.offload is not None
    load = load_spread if is_spread else load_model
    model = load(role.path, config, name_hint=role.hint)
    resolved = resolve_sampling(role.sampling or sampling, model.generation_defaults)
    if role.draws:
        for note in resolved.notes:
            logger.warning("%s: %s", role.path, note)
    return Engine(
        model,
        resolved,
        max_batch_tokens=config.max_batch_tokens,
        max_rows=config.max_rows,
        rows_per_question=rows_per_question(role, sampling),
        draws=role.draws,
    )


def rows_per_question(role: ModelRole, sampling: SamplingConfig) -> int:
    """Answers that share a prompt: those to a sample; of a judge's replies, one is safe to say."""
    return sampling.sample_k if role.stage == "rollouts" else 1


def share_device(engines: Sequence[Engine]) -> None:
    """Divide what is free among engines whose weights are all in memory, and plan each.

    Who needs little (an engine that only scores) gets all it can use, the others share the rest;
    so none takes what another needs, whichever runs first. An engine with rows in flight keeps its
    plan.

    Raises:
        ConfigError: when one's part does not hold one answer.
    """
    sharing = [engine for engine in engines if engine.model.shares_prefix]
    kept = [engine for engine in sharing if engine.is_busy]
    planned = [engine for engine in sharing if not engine.is_busy]
    if not planned:
        return
    for engine in planned:
        engine.allowance = None
        engine.budget.max_tokens, engine.budget.max_rows = engine.bounds
        engine.clear_cache()
    available = planned[0].available() - sum(engine.still_to_take() for engine in kept)
    wants = [wanted_bytes(engine.demand()) for engine in planned]
    for engine, part in zip(planned, share_out(max(0, available), wants)):
        engine.allowance = part
        engine.plan_memory()


def free_bytes(device: torch.device, *, ranks: int) -> int:
    """Bytes that this process may still take on a device that this host's `ranks` may share."""
    if device.type != "cuda":
        return host_available(share=ranks)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free // -(-ranks // torch.cuda.device_count())


def or_record_error(make: Callable[[], MadeT]) -> MadeT | RecordError:
    """What `make` makes of one record on the host, or why that cannot be."""
    try:
        return make()
    except RecordError as error:
        return error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return RecordError(
            "out_of_host_memory",
            f"preparing its images took more memory than the host has ({error}); a lower "
            "--max_image_pixels rejects such images when they are read",
        )


def decode_image(image: EncodedImage) -> Image.Image:
    """Decode an image fully, turned as its EXIF orientation says (ingest stores none).

    Raises:
        RecordError: where Pillow cannot, or its pixels do not become RGB.
    """
    try:
        decoded = Image.open(BytesIO(image.data))
        decoded.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecordError("undecodable_image", f"{image.path}: {error}") from error
    check_depth(decoded)
    return upright(decoded)


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
