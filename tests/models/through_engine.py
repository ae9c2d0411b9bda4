"""A family through the engine: shared prefixes, its own attention, all prompts in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.engine import load_engine
from stream_engine.engine.requests import GenerateRequest, RowRequest, ScoreRequest
from stream_engine.models.base import Prompt


class ThroughEngine:
    """One engine on a checkpoint, greedy, with no penalty, whatever the checkpoint suggests."""

    def __init__(self, checkpoint: Path, num_tokens: int, *, device: str = "cpu") -> None:
        config = ModelConfig(device=device, dtype="float32")
        sampling = SamplingConfig(
            temperature=0.0, max_new_tokens=num_tokens, repetition_penalty=1.0, top_k=0, top_p=1.0
        )
        self.engine = load_engine(ModelRole("model", str(checkpoint), "rollouts"), config, sampling)
        self.model = self.engine.model
        assert self.model.shares_prefix, self.engine.self_test

    def greedy(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens of each prompt's answer, the end token included."""
        rows = (RowRequest(0),)
        requests = [GenerateRequest(str(n), prompt, rows) for n, prompt in enumerate(prompts)]
        answers = {}
        for generation in self.engine.generate(requests):
            row = generation.rows[0]
            end = [] if row.end_token_id is None else [row.end_token_id]
            answers[generation.key] = row.token_ids + end
        return [answers[str(n)] for n in range(len(prompts))]

    def logps(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[list[int]]]
    ) -> list[list[torch.Tensor]]:
        """Token log-probs of each prompt's answers."""
        requests = [
            ScoreRequest(str(n), prompt, tuple(map(tuple, of_prompt)))
            for n, (prompt, of_prompt) in enumerate(zip(prompts, answers))
        ]
        scored = {scored.key: scored.token_logps for scored in self.engine.score(requests)}
        return [[torch.tensor(row) for row in scored[str(n)]] for n in range(len(prompts))]
