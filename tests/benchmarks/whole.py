"""generate, score, end_to_end, counts: one question's work, against the ways others do it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
    share_device,
)
from stream_engine.engine.attention_steps import ATTENTION_NAME
from stream_engine.engine.cpu import pack_linears
from stream_engine.models.base import Prompt
from tests.benchmarks import baselines
from tests.benchmarks.harness import Results, Variant, compare, timed
from tests.benchmarks.synthetic import SHAPES, Shape, SyntheticVLM, build_llava
from tests.benchmarks.with_vllm import VllmProcess, serving

BASELINE_BYTES = 16 << 30
"""What the engines leave free on a GPU, for the caches and logits of the baselines."""
Keep = Callable[[Results], None]


@dataclass
class Setting:
    """Models of one shape, ready on both sides."""

    shape: Shape
    hf: Any  # for the baselines, as transformers loads it
    best: Any  # the same weights with the engine's linear layers
    continuous: baselines.Continuous  # over `best`
    engine: Engine
    reward: Engine
    k: int
    answer_tokens: int
    prompts: list[Prompt]


def set_up(
    name: str,
    *,
    k: int = 10,
    answer_tokens: int = 150,
    questions: int = 1,
    max_rows: int = 0,
    dtype: torch.dtype | None = None,
) -> Setting:
    """Random models; on CPU in float32, on a GPU in bfloat16 without copies of the weights."""
    shape = SHAPES[name]
    cuda = torch.cuda.is_available()
    where: dict[str, Any] = {"dtype": dtype or (torch.bfloat16 if cuda else torch.float32)}
    if cuda:
        where["device"] = "cuda"
    hf = build_llava(shape, **where)
    best = hf if cuda else copy.deepcopy(hf)
    if not cuda:
        pack_linears(best)
    sampling = ResolvedSampling(
        temperature=0.7, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=answer_tokens
    )
    own = build_llava(shape, **where) if cuda else copy.deepcopy(hf)
    engine = Engine(
        SyntheticVLM(own, shape), sampling, max_rows=max_rows or None, rows_per_question=k
    )
    other = build_llava(shape, seed=1, **where)
    reward = Engine(SyntheticVLM(other, shape), sampling, draws=False)
    if cuda:
        kept = torch.empty(BASELINE_BYTES, dtype=torch.uint8, device="cuda")
        share_device([engine, reward])
        del kept
        torch.cuda.empty_cache()
    continuous = baselines.Continuous(best)
    prompts = [engine.model.question(n) for n in range(questions)]
    return Setting(shape, hf, best, continuous, engine, reward, k, answer_tokens, prompts)


def requests(setting: Setting) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            str(n),
            prompt,
            tuple(RowRequest(row_seed(0, str(n), j)) for j in range(setting.k)),
        )
        for n, prompt in enumerate(setting.prompts)
    ]


def generate_all(setting: Setting) -> list[Generation]:
    return list(setting.engine.generate(requests(setting)))


def score_all(setting: Setting, generated: list[Generation]) -> list[Any]:
    to_score = [
        ScoreRequest(
            g.key,
            setting.prompts[int(g.key)],
            tuple(tuple(row.token_ids) for row in g.rows),
        )
        for g in generated
    ]
    return list(setting.reward.score(to_score))


def samplers(s: Setting) -> dict[str, Callable[[], Tensor]]:
    """How the baselines draw k answers to a question; `continuous` to `continuous_questions`."""
    prompt = s.prompts[0]
    several = s.prompts[: continuous_questions(s)]
    return {
        "ancestor": lambda: baselines.ancestor_generate(s.hf, prompt, s.k, s.answer_tokens),
        "nrs": lambda: baselines.nrs_generate(s.hf, prompt, s.k, s.answer_tokens),
        "nrs_best": lambda: baselines.nrs_generate(
            s.best, prompt, s.k, s.answer_tokens, static=True
        ),
        "continuous": lambda: s.continuous.generate(several, s.k, s.answer_tokens)[0],
    }


def continuous_questions(s: Setting) -> int:
    """Questions at once through continuous batching: without flash attention one is its best.

    There every row meets every key under a mask, so that more rows cost more than they save.
    """
    return len(s.prompts) if torch.cuda.is_available() else 1


def against_baselines(
    s: Setting,
    variants: Mapping[str, Variant],
    facts: Results,
    *,
    rounds: int,
    warm_up: Mapping[str, Variant] | None = None,
    keep: Keep | None = None,
) -> Results:
    """Compare with the engine a question, with what a reader of the figures has to know."""
    num_questions = len(s.prompts)
    units = {
        "engine": num_questions,
        "continuous": continuous_questions(s),
        "vllm": num_questions,
        "vllm_cached": num_questions,
    }
    note = (
        "seconds and ratios are per question: `engine` (and vllm) takes its questions at once, "
        "`engine_single` one alone, and so do the baselines, to whom each costs the same; the part "
        "`scoring` is one model's, by `batched` under nrs, by `batched_best` under nrs_best and "
        "continuous"
    )

    def tell(results: Results) -> Results:
        caches = {
            "instruct": s.engine.runner.cache.num_bytes,
            "reward": s.reward.runner.cache.num_bytes,
        }
        counted = {
            "continuous_language_model_tokens": s.continuous.language_model_tokens,
            # kept between calls, hence not in `peak_extra_mib`
            "engine_cache_mib": {role: round(size / 2**20, 1) for role, size in caches.items()},
        }
        return {**facts, "questions": units, "note": note, **counted, **results}

    return tell(
        compare(
            variants,
            rounds=rounds,
            subject=[name for name in variants if name.startswith("engine")],
            warm_up=warm_up,
            units=units,
            optional=("continuous",),
            keep=keep and (lambda results: keep(tell(results))),
        )
    )


def generation(name: str, rounds: int, questions: int = 1, keep: Keep | None = None) -> Results:
    """Sampling alone."""
    s = set_up(name, questions=questions)
    variants = {"engine": lambda: generate_all(s), **samplers(s)}
    return against_baselines(s, variants, {"shape": name}, rounds=rounds, keep=keep)


def scoring(name: str, rounds: int, keep: Keep | None = None) -> Results:
    """One model's log-probs of ten given answers."""
    s = set_up(name)
    prompt = s.prompts[0]
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
    full = torch.stack([torch.tensor(row) for row in engine()[0].token_logps])
    difference = (full - baselines.batched_score(s.hf, prompt, answers).cpu()).abs().max()
    facts = {"shape": name, "max_logp_difference": difference.item()}
    return facts | compare(
        variants,
        rounds=rounds,
        subject="engine",
        keep=keep and (lambda results: keep(facts | results)),
    )


def end_to_end(
    name: str,
    rounds: int,
    questions: int = 1,
    without: Collection[str] = (),
    keep: Keep | None = None,
    vllm_python: Path | None = None,
    vllm_compiled: bool = False,
    **sizes: Any,
) -> Results:
    """A whole question, sampling and the log-probs of both models, and its parts alone.

    `scoring` is one model's scoring of the ten answers. The engine scores with the reward model
    only, since the instruct model's log-probs fall out of generation, as vLLM's do; the others
    score twice. With `vllm_python`, the Python of an environment with vLLM, that is one of them.
    """
    s = set_up(name, questions=questions, **sizes)
    checked = check(s)  # warms the engine up
    variants: dict[str, Variant] = {"engine": partial(engine_whole, s)}
    warm_up: dict[str, Variant] = {"engine": lambda: None}
    if questions > 1 and "engine_single" not in without:
        variants["engine_single"] = partial(engine_whole, replace(s, prompts=s.prompts[:1]))
    variants |= baseline_wholes(s, without)
    if not torch.cuda.is_available():  # there other lengths are other compiled graphs
        warm_up |= baseline_wholes(replace(s, k=2, answer_tokens=4), without)
    facts = {"shape": name, "dtype": str(s.hf.dtype), **checked}
    with ExitStack() as stack:
        if vllm_python is not None:
            given = vllm_python, s.hf, s.engine.model, s.prompts
            vllm = stack.enter_context(serving(*given, is_compiled=vllm_compiled))
            found = vllm.versions | vllm_differences(s, vllm)
            facts["vllm"] = found | {"compiled": vllm_compiled}
            for variant, reads_cache in (("vllm", False), ("vllm_cached", True)):
                if variant in without:
                    continue
                sizes_asked = s.k, s.answer_tokens, questions
                variants[variant] = partial(vllm.whole, *sizes_asked, reads_cache=reads_cache)
                warm_up[variant] = lambda: None  # it has run
        return against_baselines(s, variants, facts, rounds=rounds, warm_up=warm_up, keep=keep)


def vllm_differences(s: Setting, vllm: VllmProcess) -> Results:
    """The largest differences of vLLM's log-probs from transformers', for one question."""
    answers, drawn, _ = vllm.draw(s.k, s.answer_tokens, 1)
    truth = baselines.batched_score(s.hf, s.prompts[0], torch.tensor(answers)).cpu()
    found = {"sampling": drawn}
    for name, reads_cache in (("scoring", False), ("scoring_cached", True)):
        found[name], _ = vllm.score(answers, s.k, reads_cache=reads_cache)
    return {
        "max_logp_difference": {
            name: (torch.tensor(logps) - truth).abs().max().item() for name, logps in found.items()
        }
    }


def engine_whole(s: Setting) -> dict[str, float]:
    generated, sampling = timed(lambda: generate_all(s))
    _, scoring = timed(lambda: score_all(s, generated))
    return {"sampling": sampling, "scoring": scoring}


def baseline_wholes(s: Setting, without: Collection[str]) -> dict[str, Variant]:
    score = {
        "ancestor": partial(baselines.ancestor_score, s.hf),
        "nrs": partial(baselines.batched_score, s.hf),
        "nrs_best": partial(baselines.batched_score, s.best),
        "continuous": partial(baselines.batched_score, s.best),
    }

    def whole(draw: Callable[[], Tensor], score: Callable[[Prompt, Tensor], Any]) -> dict:
        answers, sampling = timed(draw)
        each = list(zip(s.prompts, answers.split(s.k)))  # every question has its k answers
        score_each = lambda: [score(prompt, rows) for prompt, rows in each]  # noqa: E731
        _, scoring = timed(score_each)
        score_each()  # the other model's
        return {"sampling": sampling, "scoring": scoring}

    return {
        name: partial(whole, draw, score[name])
        for name, draw in samplers(s).items()
        if name not in without
    }


def counts(name: str) -> Results:
    """What passes through the models for one question, and how right what comes out is."""
    return {"shape": name, **check(set_up(name))}


def check(s: Setting) -> Results:
    """One pass of the engine: counted by hooks, and against transformers' log-probs of its ids."""
    with counting(s.engine) as instruct, counting(s.reward) as reward:
        generated = sorted(generate_all(s), key=lambda one: int(one.key))
        scored = score_all(s, generated)
    difference = 0.0
    with transformers_attention(s.reward) as reward_hf:
        for n in {0, len(s.prompts) - 1}:
            rows = generated[n].rows
            ids = torch.tensor([row.token_ids for row in rows], device=s.hf.device)
            for hf, logps in (
                (s.hf, [row.token_logps for row in rows]),
                (reward_hf, scored[n].token_logps),
            ):
                truth = baselines.batched_score(hf, s.prompts[n], ids).cpu()
                difference = max(difference, (torch.tensor(logps) - truth).abs().max().item())
    tokens = sum(map(len, s.prompts)) + len(s.prompts) * s.k * (s.answer_tokens - 1)
    return {
        "max_logp_difference": difference,
        "expected_language_model_tokens": tokens,
        "instruct": instruct,
        "reward": reward,
    }


@contextmanager
def transformers_attention(engine: Engine) -> Iterator[Any]:
    """The engine's model as transformers runs it."""
    engine.model.set_attention("sdpa")
    try:
        yield engine.model.hf
    finally:
        engine.model.set_attention(ATTENTION_NAME)


@contextmanager
def counting(engine: Engine) -> Iterator[dict[str, int]]:
    """Count images, language model tokens and head rows; filled in at the end."""
    seen = {"images": 0, "language_model_tokens": 0}

    def images(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        seen["images"] += len(args[0] if args else kwargs["pixel_values"])

    def tokens(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        seen["language_model_tokens"] += kwargs["inputs_embeds"].shape[1]

    model = engine.model
    hooks = [
        model.hf.model.vision_tower.register_forward_pre_hook(images, with_kwargs=True),
        model.backbone.register_forward_pre_hook(tokens, with_kwargs=True),
    ]
    engine.counters.clear()
    yield seen
    for hook in hooks:
        hook.remove()
    counters = engine.counters
    seen["head_rows"] = counters["head_rows"]
    if engine.decoder.graphs is not None:  # a replayed graph calls no hooks
        passed = ("prompt_tokens", "suffix_tokens", "decode_tokens")
        seen["language_model_tokens"] = sum(counters[each] for each in passed)
