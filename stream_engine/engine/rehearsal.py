"""A profile run: the memory plan is tried by one decode step and one prefill at full size.

Its tokens are made up. What is written meanwhile lies in slots and spans that nobody owns, and
counts nowhere. The random numbers of answers depend on seed and position only, so nothing that is
drawn later changes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from PIL import Image
from stream_kernels import HostLayout

from stream_engine.engine.decode import (
    CaptureError,
    DecodeInput,
    Decoder,
    decode_eagerly,
)
from stream_engine.engine.draw import draw
from stream_engine.engine.memory import STEPS_PER_READ
from stream_engine.errors import RecordError

if TYPE_CHECKING:
    from stream_engine.engine.memory import MemoryPlan
    from stream_engine.engine.runner import ModelRunner
    from stream_engine.models.base import Prompt

logger = logging.getLogger(__name__)

QUESTION = "Describe the picture in detail: what is there, where does it lie, what is going on?"
PICTURE_SIZE = (640, 480)


def typical_prompt(runner: ModelRunner) -> Prompt:
    """An ordinary question, about an ordinary picture where the model takes pictures."""
    picture = Image.radial_gradient("L").resize(PICTURE_SIZE).convert("RGB")
    try:
        return runner.model.prompt(QUESTION, [picture])
    except RecordError:
        return runner.model.prompt(QUESTION, [])


@torch.no_grad()
def rehearse(runner: ModelRunner, decoder: Decoder, plan: MemoryPlan) -> None:
    """Run the largest steps that the plan allows, in slabs of its size. Nothing may be in flight.

    Raises:
        torch.OutOfMemoryError: when it does not fit.
    """
    counters = dict(runner.counters)
    try:
        _prefill(runner, plan)
        if plan.rows:
            _decode(runner, decoder, plan)
        if runner.model.device.type == "cuda":
            torch.cuda.synchronize(runner.model.device)
    finally:
        runner.counters.clear()
        runner.counters.update(counters)


def _prefill(runner: ModelRunner, plan: MemoryPlan) -> None:
    """Prompts that fill one forward; answers over them where the plan is to score."""
    prompt = typical_prompt(runner)
    fitting = min(plan.prefill_tokens, plan.prefix_tokens) // len(prompt)
    spans = [(runner.cache.allocate_span(len(prompt)), len(prompt)) for _ in range(fitting or 1)]
    runner.prefill([prompt] * len(spans), [start for start, _ in spans])
    if not plan.rows:
        answer = [0] * max(1, min(plan.slot_tokens, plan.prefill_tokens // len(spans)))
        each = max(1, plan.prefill_tokens // (len(answer) * len(spans)))
        runner.extend([(prompt, span, [answer] * each) for span in spans])
    for span in spans:
        runner.cache.release_span(*span)


def _decode(runner: ModelRunner, decoder: Decoder, plan: MemoryPlan) -> None:
    rows = list(range(plan.rows))
    length = max(1, plan.slot_tokens - STEPS_PER_READ)
    k = plan.rows_per_question
    groups = [rows[first : first + k] for first in range(0, len(rows), k)]
    prompt_tokens = plan.prefix_tokens // len(groups)
    batch = DecodeInput(
        tokens=[0] * len(rows),
        positions=[min(prompt_tokens + length, runner.max_positions) - 1] * len(rows),
        seeds=rows,
        counts=[0] * len(rows),
        layout=HostLayout(
            spans=[(place * prompt_tokens, prompt_tokens) for place in range(len(groups))],
            groups=groups,
            slots=rows,
            suffix_lengths=[length] * len(rows),
        ),
    )
    if runner.seen is not None:
        runner.seen.begin(rows)
    if decoder.graphs is not None:
        try:
            decoder.graphs.run(batch, 1)
        except CaptureError as error:  # handled at the first real step
            logger.info("a decode step could not be captured: %s", error)
        else:
            return
    logits = runner.logits(decode_eagerly(runner, batch))
    slots = torch.tensor(rows, device=logits.device)
    seen = None if runner.seen is None else runner.seen.of(slots)
    draw(runner, logits, slots, torch.zeros_like(slots), seen)
