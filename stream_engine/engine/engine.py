"""Engine: one loaded model, ready for streams of requests.

It offers three operations: `generate`, `score`, `next_token_logps`; everything else stands in the
parts that it wires together. Models whose attention the shared prefix cannot reach run through the
plain fallback instead, and say so in `describe()`.

    requests ──▶ Scheduler ─ Decoder ─┐
                 score, plain ────────┼──▶ ModelRunner ──▶ VisionLanguageModel
                 MemoryPlanner ───────┘    (cache, budget, head)
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from PIL.Image import Image

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.device_errors import is_out_of_memory
from stream_engine.engine.attention_steps import ATTENTION_NAME
from stream_engine.engine.batching import map_ahead
from stream_engine.engine.decode import Decoder
from stream_engine.engine.memory import rows_per_question
from stream_engine.engine.parallel import load_spread
from stream_engine.engine.plain import plain_generate, plain_next_token_logps, plain_score
from stream_engine.engine.planner import MemoryPlanner, share_memory
from stream_engine.engine.prefixes import SharedPrompt, share_prompt
from stream_engine.engine.requests import (
    GenerateRequest,
    Generation,
    NextTokenLogps,
    RequestFailure,
    ScoredContinuations,
    ScoreRequest,
)
from stream_engine.engine.runner import ModelRunner
from stream_engine.engine.sampling import ResolvedSampling, resolve_sampling
from stream_engine.engine.scheduler import Scheduler
from stream_engine.engine.score import next_token_logps, score
from stream_engine.engine.selftest import check_model
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models import load_model
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.pictures import decode_image
from stream_engine.records import EncodedImage
from stream_engine.timing import spent_on

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
        self.runner = runner = ModelRunner(
            model,
            sampling,
            max_batch_tokens=max_batch_tokens,
            max_rows=max_rows,
            rows_per_question=rows_per_question,
        )
        model.set_attention(ATTENTION_NAME)
        self.self_test = check_model(runner)
        bytes_per_token = max(1, runner.cache.bytes_per_token)
        runner.cache.clear()
        runner.counters.clear()
        self.decoder = Decoder(runner)
        self.planner = MemoryPlanner(
            runner, self.decoder, bytes_per_token=bytes_per_token, draws=draws
        )
        self.scheduler = Scheduler(runner, self.decoder, self.planner)
        runner.drop_early = self.scheduler.forget

    @property
    def sampling(self) -> ResolvedSampling:
        return self.runner.sampling

    @property
    def counters(self) -> Counter[str]:
        """Images, prompts, tokens and head rows that went through the model so far."""
        return self.runner.counters

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self.runner.stop_token_ids

    def fits(self, prompt: Prompt, num_tokens: int) -> bool:
        """Whether so many tokens can stand behind a prompt."""
        return self.runner.refusal(prompt, num_tokens) is None

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
            return key, or_record_error(lambda: self.model.ask(question, decoded(images)))

        yield from map_ahead(make, questions, threads=HOST_THREADS, ahead=4 * HOST_THREADS)

    def prepare_shared(
        self, questions: Iterable[tuple[str, Sequence[str], Sequence[EncodedImage]]]
    ) -> Iterator[tuple[str, SharedPrompt | RecordError]]:
        """As `prepare`, for (key, several questions, the images they share): one prefix a key."""

        def make(
            item: tuple[str, Sequence[str], Sequence[EncodedImage]],
        ) -> tuple[str, SharedPrompt | RecordError]:
            key, texts, images = item
            return key, or_record_error(lambda: share_prompt(self.runner, texts, decoded(images)))

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
            scheduler = self.scheduler
            if scheduler.is_running:
                scheduler = Scheduler(self.runner, self.decoder, self.planner)
            yield from scheduler.run(requests, ahead)
        else:
            yield from plain_generate(self.runner, requests)

    @torch.no_grad()
    def score(
        self, requests: Iterable[ScoreRequest]
    ) -> Iterator[ScoredContinuations | RequestFailure]:
        """Log-probs of given continuations; results in order."""
        run = score if self.model.shares_prefix else plain_score
        yield from run(self.runner, requests)

    @torch.no_grad()
    def next_token_logps(
        self, requests: Iterable[ScoreRequest], watched: Sequence[int]
    ) -> Iterator[NextTokenLogps | RequestFailure]:
        """Log-probs of watched tokens after given continuations; results in order."""
        run = next_token_logps if self.model.shares_prefix else plain_next_token_logps
        yield from run(self.runner, requests, watched)

    def close(self) -> None:
        """Free the model's memory; the engine is of no use afterwards."""
        self.runner.clear_cache()
        del self.model, self.runner, self.decoder, self.planner, self.scheduler
        gc.collect()  # the engine and its parts refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """What runs, in plain values, for run.json and the printed plan."""
        model, plan = self.model, self.planner.plan
        return {
            "checkpoint": str(model.checkpoint),
            "family": model.family,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes": self.runner.weight_bytes,
            "tensor_parallel": model.tensor_parallel,
            "offload": model.offload,
            "attention": "shared prefix" if model.shares_prefix else "plain",
            "self_test": self.self_test,
            "max_tokens": self.runner.budget.max_tokens,
            "max_rows": self.runner.budget.max_rows,
            "max_prefix_tokens": self.runner.cache.max_prefix_tokens,
            "memory": None if plan is None else plan.to_dict(),
            "sampling": {
                name: getattr(self.sampling, name)
                for name in self.sampling.__struct_fields__
                if name not in ("sources", "notes")
            },
            "sampling_sources": self.sampling.sources,
            "sampling_notes": list(self.sampling.notes),
            "stop_token_ids": sorted(self.stop_token_ids),
        }


def load_engine(
    role: ModelRole,
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    model: VisionLanguageModel | None = None,
) -> Engine:
    """Load a role's checkpoint and make it ready; the role's own sampling wins over the run's.

    `model` is that of another engine of the same checkpoint: its weights are shared, not loaded.

    Raises:
        CheckpointError: with the file or tensor at fault.
        ConfigError: when it cannot be split over ranks or offloaded as the settings say.
    """
    is_spread = config.tensor_parallel > 1 or config.offload is not None
    load = load_spread if is_spread else load_model
    model = model or load(role.path, config, name_hint=role.hint)
    try:
        resolved = resolve_sampling(role.sampling or sampling, model.generation_defaults)
    except CheckpointError as error:
        raise CheckpointError(f"{role.path}: {error}") from error
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


def share_device(engines: Sequence[Engine]) -> None:
    """Divide the memory that is free among engines whose weights are all in memory.

    Raises:
        ConfigError: when one's part does not hold one answer.
    """
    share_memory([engine.planner for engine in engines])


@spent_on("pictures")
def decoded(images: Sequence[EncodedImage]) -> list[Image]:
    """A record's images, decoded fully."""
    return [decode_image(image.data, image.path) for image in images]


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
