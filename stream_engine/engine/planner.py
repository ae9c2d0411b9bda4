"""MemoryPlanner: the largest batch that a model may run: computed, tried, and shared with others.

What is computed stands in memory.py; here are the loaded model, and the card.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.engine.decode import Decoder
from stream_engine.engine.host_memory import host_available
from stream_engine.engine.memory import (
    PENALTY_COPIES,
    STEPS_PER_READ,
    Demand,
    MemoryPlan,
    language_shape,
    plan_memory,
    share_out,
    wanted_bytes,
)
from stream_engine.engine.parallel import agreed_minimum
from stream_engine.engine.rehearsal import rehearse, typical_prompt
from stream_engine.engine.runner import ModelRunner
from stream_engine.ranks import Rank

logger = logging.getLogger(__name__)

SMALLER = 0.85
"""A plan that did not hold is made anew for this share of the memory."""


class MemoryPlanner:
    """The memory plan of one model: made when it is loaded, when others come, and after OOM."""

    def __init__(
        self, runner: ModelRunner, decoder: Decoder, *, bytes_per_token: int, draws: bool
    ) -> None:
        """`bytes_per_token` are those of keys and values; `draws` False: it will only score.

        Raises:
            ConfigError: when the memory that is free does not hold one answer.
        """
        model, budget = runner.model, runner.budget
        self.runner = runner
        self.decoder = decoder
        self.bytes_per_token = bytes_per_token
        self.draws = draws
        self.bounds = (budget.max_tokens, budget.max_rows)
        self.slot_tokens = runner.sampling.max_new_tokens + STEPS_PER_READ
        self.prompt_tokens = len(typical_prompt(runner)) if model.shares_prefix else 0
        self.allowance: int | None = None
        """Bytes beside the weights that this model may take; None: all that is free."""
        self.plan: MemoryPlan | None = None
        self.is_planned = False
        self.rehearses = model.device.type == "cuda" and model.tensor_parallel == 1
        """Whether a plan is tried at full size before it is used."""
        runner.drop_plan = self.drop
        if model.shares_prefix and self.rehearses:  # other models may yet be loaded beside it
            self._adopt(plan_memory(self.demand(), self.available(), weights=runner.weight_bytes))
        else:
            self.plan_memory()

    def drop(self) -> None:
        """Let the next generation plan anew, after out-of-memory."""
        cache = self.runner.cache
        if (
            self.runner.model.device.type == "cuda"
        ):  # rows with long prompts of their own made it larger
            self.slot_tokens = max(self.slot_tokens, cache.slot_capacity)
        self.is_planned = False

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
        if not self.runner.model.shares_prefix:
            return
        self.runner.clear_cache()
        demand, available = self.demand(), self.available()
        while True:
            plan = plan_memory(demand, available, weights=self.runner.weight_bytes)
            if self._holds(plan):
                break
            available = int(SMALLER * available)
        self.is_planned = True

    def demand(self) -> Demand:
        """What this engine asks of memory, in numbers learnt from the loaded model."""
        model, budget = self.runner.model, self.runner.budget
        config: Any = model.backbone.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocab, hidden = model.lm_head.weight.shape
        itemsize = model.dtype.itemsize
        on_cuda = model.device.type == "cuda"
        copies = 1.0 + 2 * (model.logit_softcap is not None)
        if self.runner.seen is not None:
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
            rows_per_question=self.runner.rows_per_question,
            logit_copies=copies,
            device=model.device.type,
            grows=not on_cuda,
            graphs=self.decoder.graphs is not None,
        )

    def available(self) -> int:
        """Bytes free for this engine; ranks that hold a model together agree on the least."""
        free = free_bytes(self.runner.model.device, Rank.from_environment())
        if self.runner.model.tensor_parallel > 1:
            free = agreed_minimum(free)
        return free if self.allowance is None else min(free, self.allowance)

    def still_to_take(self) -> int:
        """Bytes that the plan allows and that are not allocated yet."""
        assert self.plan is not None
        return max(0, self.plan.total - self.plan.reserve - self.runner.cache.num_bytes)

    def _holds(self, plan: MemoryPlan) -> bool:
        """Confirm a plan: by its largest steps on an accelerator, against what is free on CPU.

        Ranks that hold a model together try nothing: one that fails leaves the others waiting.
        """
        self._adopt(plan)
        if not self.rehearses:
            confirmed = self.runner.model.device.type != "cuda" and plan.total <= self.available()
            self.plan = replace(plan, confirmed=confirmed)
            if self.runner.model.device.type == "cuda":
                self._preallocate(plan)
            return confirmed or self.runner.model.tensor_parallel > 1
        try:
            self._preallocate(plan)
            rehearse(self.runner, self.decoder, plan)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            if is_device_lost(error):
                raise
            self.runner.free_memory()
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
        self.runner.cache.preallocate(
            prefix_tokens=plan.prefix_tokens,
            slots=plan.rows + 1 if plan.rows else 0,
            slot_tokens=plan.slot_tokens if plan.rows else 0,
        )

    def _adopt(self, plan: MemoryPlan) -> None:
        """Let budget and cache follow a plan."""
        budget = self.runner.budget
        self.plan = plan
        self.runner.cache.max_prefix_tokens = plan.prefix_tokens
        budget.max_tokens = max(1, int(plan.prefill_tokens / budget.scale))
        if plan.rows:
            budget.max_rows = max(1, int(plan.rows / budget.scale))


def share_memory(planners: Sequence[MemoryPlanner]) -> None:
    """Divide what is free among models whose weights are all in memory, and plan each.

    Who needs little (a model that only scores) gets all it can use, the others share the rest;
    so none takes what another needs, whichever runs first. One with rows in flight keeps its
    plan.

    Raises:
        ConfigError: when one's part does not hold one answer.
    """
    sharing = [planner for planner in planners if planner.runner.model.shares_prefix]
    kept = [planner for planner in sharing if planner.runner.is_busy]
    planned = [planner for planner in sharing if not planner.runner.is_busy]
    if not planned:
        return
    for planner in planned:
        planner.allowance = None
        budget = planner.runner.budget
        budget.max_tokens, budget.max_rows = planner.bounds
        planner.runner.clear_cache()
    available = planned[0].available() - sum(planner.still_to_take() for planner in kept)
    wants = [wanted_bytes(planner.demand()) for planner in planned]
    for planner, part in zip(planned, share_out(max(0, available), wants)):
        planner.allowance = part
        planner.plan_memory()


def free_bytes(device: torch.device, rank: Rank) -> int:
    """Bytes that this process may still take on a device that other ranks may share."""
    if device.type != "cuda":
        return host_available(share=rank.local_world_size)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free // rank.ranks_per_device(torch.cuda.device_count())
