"""generate, score, end_to_end, counts: one question's work, against the ways others do it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stream_engine.engine import (
    Engine,
    GenerateRequest,
    Generation,
    ResolvedSampling,
    RowRequest,
    ScoreRequest,
    row_seed,
)
from stream_engine.engine.cpu import pack_linears
from tests.benchmarks import baselines
from tests.benchmarks.harness import compare
from tests.benchmarks.synthetic import SHAPES, Shape, SyntheticVLM, build_llava


@dataclass
class Setting:
    """Models of one shape, ready on both sides."""

    shape: Shape
    hf: Any  # for the baselines, as transformers loads it
    best: Any  # the same weights with the engine's linear layers
    engine: Engine
    reward: Engine
    k: int
    answer_tokens: int
    questions: int


def set_up(
    name: str, *, k: int = 10, answer_tokens: int = 150, questions: int = 1, max_rows: int = 0
) -> Setting:
    """Random models; on CPU in float32, on a GPU in bfloat16 without copies of the weights."""
    shape = SHAPES[name]
    cuda = torch.cuda.is_available()
    where = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    hf = build_llava(shape, **where)
    best = hf if cuda else copy.deepcopy(hf)
    if not cuda:
        pack_linears(best)
    sampling = ResolvedSampling(
        temperature=0.7, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=answer_tokens
    )
    own = build_llava(shape, **where) if cuda else copy.deepcopy(hf)
    engine = Engine(SyntheticVLM(own, shape), sampling, max_rows=max_rows or None)
    other = build_llava(shape, seed=1, **where)
    reward = Engine(SyntheticVLM(other, shape), sampling)
    return Setting(shape, hf, best, engine, reward, k, answer_tokens, questions)


def requests(setting: Setting) -> list[GenerateRequest]:
    prompt = setting.engine.model.question
    return [
        GenerateRequest(
            str(n),
            prompt(n),
            tuple(RowRequest(row_seed(0, str(n), j)) for j in range(setting.k)),
        )
        for n in range(setting.questions)
    ]


def generate_all(setting: Setting) -> list[Generation]:
    return list(setting.engine.generate(requests(setting)))


def score_all(setting: Setting, generated: list[Generation]) -> list[Any]:
    to_score = [
        ScoreRequest(
            g.key,
            setting.reward.model.question(int(g.key)),
            tuple(tuple(row.token_ids) for row in g.rows),
        )
        for g in generated
    ]
    return list(setting.reward.score(to_score))


def generation(name: str, rounds: int) -> dict[str, Any]:
    """Sampling alone."""
    s = set_up(name)
    prompt = s.engine.model.question(0)
    variants = {
        "engine": lambda: generate_all(s),
        "ancestor": lambda: baselines.ancestor_generate(s.hf, prompt, s.k, s.answer_tokens),
        "nrs": lambda: baselines.nrs_generate(s.hf, prompt, s.k, s.answer_tokens),
        "nrs_best": lambda: baselines.nrs_generate(
            s.best, prompt, s.k, s.answer_tokens, static=True
        ),
    }
    return {"shape": name, **compare(variants, rounds=rounds, subject="engine")}


def scoring(name: str, rounds: int) -> dict[str, Any]:
    """One model's log-probs of ten given answers."""
    s = set_up(name)
    prompt = s.engine.model.question(0)
    answers = torch.randint(
        3, s.shape.vocab - 1, (s.k, s.answer_tokens), generator=torch.Generator().manual_seed(0)
    ).to(s.hf.device)
    ids = tuple(tuple(row) for row in answers.tolist())

    def engine() -> list[Any]:
        return list(s.engine.score([ScoreRequest("0", prompt, ids)]))

    variants = {
        "engine": engine,
        "ancestor": lambda: baselines.ancestor_score(s.hf, prompt, answers),
        "batched_all_logits": lambda: baselines.batched_score(s.hf, prompt, answers, keep=False),
        "batched": lambda: baselines.batched_score(s.hf, prompt, answers),
        "batched_best": lambda: baselines.batched_score(s.best, prompt, answers),
    }
    results = compare(variants, rounds=rounds, subject="engine")
    full = torch.stack([torch.tensor(row) for row in engine()[0].token_logps])
    difference = (full - baselines.batched_score(s.hf, prompt, answers).cpu()).abs().max()
    return {"shape": name, "max_logp_difference": difference.item(), **results}


def end_to_end(name: str, rounds: int, questions: int = 1, baselines_too: bool = True) -> dict:
    """A whole question: sampling and the log-probs of both models."""
    s = set_up(name, questions=questions)
    prompts = [s.engine.model.question(n) for n in range(questions)]

    def engine() -> None:
        score_all(s, generate_all(s))

    def ancestor() -> None:
        for prompt in prompts:
            answers = baselines.ancestor_generate(s.hf, prompt, s.k, s.answer_tokens)
            for _ in ("instruct", "reward"):
                baselines.ancestor_score(s.hf, prompt, answers)

    def nrs(hf: nn.Module, static: bool) -> None:
        for prompt in prompts:
            answers = baselines.nrs_generate(hf, prompt, s.k, s.answer_tokens, static=static)
            for _ in ("instruct", "reward"):
                baselines.batched_score(hf, prompt, answers)

    variants = {
        "engine": engine,
        "ancestor": ancestor,
        "nrs": lambda: nrs(s.hf, False),
        "nrs_best": lambda: nrs(s.best, True),
    }
    if not baselines_too:
        variants = {"engine": engine}
    results = compare(variants, rounds=rounds, subject="engine")
    per_question = results["median_seconds"]["engine"] / questions
    return {"shape": name, "questions": questions, "seconds_a_question": per_question, **results}


def counts(name: str) -> dict[str, Any]:
    """What passes through the models for one question, counted by hooks: exact on any machine."""
    s = set_up(name)
    seen: dict[str, dict[str, int]] = {}
    for role, engine in (("instruct", s.engine), ("reward", s.reward)):
        seen[role] = {"images": 0, "language_model_tokens": 0}
        _count(engine.model, seen[role])
        engine.counters.clear()
    generated = generate_all(s)
    score_all(s, generated)
    prompt_tokens = len(s.engine.model.question(0))
    expected = prompt_tokens + s.k * (s.answer_tokens - 1)
    return {
        "shape": name,
        "expected_language_model_tokens": expected,
        "instruct": seen["instruct"] | {"head_rows": s.engine.counters["head_rows"]},
        "reward": seen["reward"] | {"head_rows": s.reward.counters["head_rows"]},
    }


def _count(model: SyntheticVLM, into: dict[str, int]) -> None:
    def images(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        into["images"] += len(args[0] if args else kwargs["pixel_values"])

    def tokens(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        into["language_model_tokens"] += kwargs["inputs_embeds"].shape[1]

    model.hf.model.vision_tower.register_forward_pre_hook(images, with_kwargs=True)
    model.backbone.register_forward_pre_hook(tokens, with_kwargs=True)
