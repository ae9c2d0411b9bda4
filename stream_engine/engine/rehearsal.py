"""A computed plan is tried: one decode step and one prefill at full size, on made-up tokens.

What is written meanwhile lies in slots and spans that nobody owns, and counts nowhere. The random
numbers of answers depend on seed and position only, so nothing that is drawn later changes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from PIL import Image
from stream_kernels import HostLayout

from stream_engine.engine.decode import (
    STEPS_PER_READ,
    CaptureError,
    DecodeInput,
    decode_eagerly,
)
from stream_engine.engine.draw import draw
from stream_engine.errors import RecordError

if TYPE_CHECKING:
    from stream_engine.engine.engine import Engine
    from stream_engine.engine.memory import MemoryPlan
    from stream_engine.models.base import Prompt

logger = logging.getLogger(__name__)

QUESTION = "Describe the picture in detail: what is there, where does it lie, what is going on?"
PICTURE_SIZE = (640, 480)


def typical_prompt(engine: Engine) -> Prompt:
    """An ordinary question, about an ordinary picture where the model takes pictures."""
    picture = Image.radial_gradient("L").resize(PICTURE_SIZE).convert("RGB")
    try:
        return engine.model.prompt(QUESTION, [picture])
    except RecordError:
        return engine.model.prompt(QUESTION, [])


@torch.no_grad()
def rehearse(engine: Engine, plan: MemoryPlan) -> None:
    """Run the largest steps that the plan allows, in slabs of its size. Nothing may be in flight.

    Raises:
        torch.OutOfMemoryError: when it does not fit.
    """
    counters = dict(engine.counters)
    try:
        _prefill(engine, plan)
        if plan.rows:
            _decode(engine, plan)
        if engine.model.device.type == "cuda":
            torch.cuda.synchronize(engine.model.device)
    finally:
        engine.counters.clear()
        engine.counters.update(counters)


def _prefill(engine: Engine, plan: MemoryPlan) -> None:
    """Prompts that fill one forward; answers over them where the plan is to score."""
    prompt = typical_prompt(engine)
    fitting = min(plan.prefill_tokens, plan.prefix_tokens) // len(prompt)
    spans = [(engine.cache.allocate_span(len(prompt)), len(prompt)) for _ in range(fitting or 1)]
    engine.prefill([prompt] * len(spans), [start for start, _ in spans])
    if not plan.rows:
        answer = [0] * max(1, min(plan.slot_tokens, plan.prefill_tokens // len(spans)))
        each = max(1, plan.prefill_tokens // (len(answer) * len(spans)))
        engine.extend([(prompt, span, [answer] * each) for span in spans])
    for span in spans:
        engine.cache.release_span(*span)


def _decode(engine: Engine, plan: MemoryPlan) -> None:
    rows = list(range(plan.rows))
    length = max(1, plan.slot_tokens - STEPS_PER_READ)
    k = plan.rows_per_question
    groups = [rows[first : first + k] for first in range(0, len(rows), k)]
    prompt_tokens = plan.prefix_tokens // len(groups)
    batch = DecodeInput(
        tokens=[0] * len(rows),
        positions=[min(prompt_tokens + length, engine.max_positions) - 1] * len(rows),
        seeds=rows,
        counts=[0] * len(rows),
        layout=HostLayout(
            spans=[(place * prompt_tokens, prompt_tokens) for place in range(len(groups))],
            groups=groups,
            slots=rows,
            suffix_lengths=[length] * len(rows),
        ),
    )
    if engine.seen is not None:
        engine.seen.begin(rows)
    if engine.graphs is not None:
        try:
            engine.graphs.run(batch, 1)
        except CaptureError as error:  # handled at the first real step
            logger.info("a decode step could not be captured: %s", error)
        else:
            return
    logits = engine.logits(decode_eagerly(engine, batch))
    slots = torch.tensor(rows, device=logits.device)
    seen = None if engine.seen is None else engine.seen.of(slots)
    draw(engine, logits, slots, torch.zeros_like(slots), seen)
