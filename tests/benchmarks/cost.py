"""Dollars and hours of a data set on H100s. COMPUTED, NOT MEASURED: no GPU made these figures.

    python -m tests.benchmarks.cost [--price 2.99] [--gpus 8] [--questions 100000] [--json]

Four ways to the same data set (answers and the log-probs of two LLaVA-1.5-7B models on each):

engine      one prefill a question and model, hundreds of rows a decode step that share prompts, the
            instruct model's log-probs from sampling, the reward model's over one prefix
vllm_hf     vLLM samples (prefix cache, log-probs free); transformers scores with the reward model,
            the ten whole sequences of a question in one batch
vllm_vllm   as before, but vLLM scores by `prompt_logprobs`, which by default reads no prefix cache
vllm_cached as before, but it is told to read it (`skip_reading_prefix_cache=False`)

Each takes the longer of the time its products take and the time its bytes take, a step at a time:
see `seconds_a_question`. What is assumed is a field of `Assumptions`, with where it comes from, and
a flag. What is measured is read from kernels/benchmarks/results: the tokens that pass through a
model (counted, the same on every machine).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "kernels" / "benchmarks" / "results"
COUNTED = RESULTS / "cpu_end_to_end_L_2_threads.json"


def assumed(value: float, source: str) -> Any:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class Assumptions:
    """Numbers, and the source of each."""

    price: float = assumed(
        2.99, "US dollars an H100 SXM and hour, on demand; lists of 2026: 2.49-3.99"
    )
    gpus: float = assumed(8, "asked")
    questions: float = assumed(100_000, "asked")
    answers: float = assumed(10, "asked: --sample_k")
    prompt_tokens: float = assumed(630, "576 of the picture, 54 of the question")
    answer_tokens: float = assumed(150, "mean length of LLaVA-1.5's answers, rounded up")
    tflops: float = assumed(989, "H100 SXM data sheet: dense bfloat16")
    terabytes_s: float = assumed(3.35, "H100 SXM data sheet: memory bandwidth")
    product_share: float = assumed(0.70, "of tflops: large products; cuBLAS reaches 0.65-0.75")
    step_share: float = assumed(0.75, "of terabytes_s: decode steps; public engines reach 0.7-0.8")
    body_parameters: float = assumed(6.476e9, "LLaVA-1.5-7B: Llama-2-7B without embeddings")
    head_parameters: float = assumed(131e6, "32000 x 4096")
    key_value_bytes: float = assumed(524_288, "a token: 2 x 32 layers x 4096 x 2 bytes")
    picture_tflop: float = assumed(0.41, "CLIP-L/336 and the projector, one picture")
    rows: float = assumed(320, "rows in a decode step; both models fit beside them in 80 GB")
    vllm_rows: float = assumed(256, "vLLM's default max_num_seqs")
    slots_in_use: float = assumed(0.96, "benchmark `refill`: decode slots in use over many shards")
    cached_reads: float = assumed(
        1.4, "bandwidth of ten rows' reads of one prompt over memory's, by the L2 cache (vLLM)"
    )
    launch_gaps: float = assumed(0.10, "share of the time in which a GPU waits for its host")
    input_s: float = assumed(0.0, "a question: pictures are decoded ahead by other threads")


def counted_tokens() -> tuple[float, float]:
    """(tokens through a model, those expected) a question, as hooks counted them on a CPU."""
    results = json.loads(COUNTED.read_text())
    per_question = max(results["questions"].get("engine", 1), 1)
    counted = results["instruct"]["language_model_tokens"] / per_question
    return counted, results["expected_language_model_tokens"] / per_question


def seconds_a_question(a: Assumptions) -> dict[str, dict[str, float]]:
    """GPU seconds a question of each way, by part."""
    flops, rate = a.tflops * 1e12 * a.product_share, a.terabytes_s * 1e12 * a.step_share
    counted, expected = counted_tokens()
    again = counted / expected  # 1 where nothing passes twice

    def products(tokens: float, head_rows: float) -> float:
        """Seconds of the products of a forward; attention's own are left out (under 5 %)."""
        return 2 * (tokens * a.body_parameters + head_rows * a.head_parameters) / flops

    def decode(rows: float, *, shared: bool) -> float:
        """Seconds a question of its decode steps at `rows` rows each."""
        weights = 2 * (a.body_parameters + a.head_parameters)
        prompts = rows / a.answers if shared else rows / a.cached_reads
        held = (prompts * a.prompt_tokens + rows * a.answer_tokens / 2) * a.key_value_bytes
        linear = max(weights / rate, products(rows, rows))
        step = linear + held / rate
        return step * a.answer_tokens * a.answers / (rows * a.slots_in_use)

    picture = a.picture_tflop * 1e12 / flops
    fed = a.answers * (a.answer_tokens - 1)
    answered = a.answers * a.answer_tokens
    whole = a.answers * (a.prompt_tokens + a.answer_tokens)
    prefill = products(a.prompt_tokens, 1) * again
    ways = {
        "engine": {
            "pictures": 2 * picture,
            "prefill": prefill,
            "decode": decode(a.rows, shared=True),
            "scoring": products(a.prompt_tokens + fed, answered) * again,
        },
        "vllm_hf": {
            "pictures": (1 + a.answers) * picture,  # a batch of ten holds ten pictures
            "prefill": prefill,
            "decode": decode(a.vllm_rows, shared=False),
            "scoring": products(whole, answered),
        },
        "vllm_vllm": {
            "pictures": 2 * picture,  # its encoder's cache
            "prefill": prefill,
            "decode": decode(a.vllm_rows, shared=False),
            "scoring": products(whole, whole),
        },
        "vllm_cached": {
            "pictures": 2 * picture,
            "prefill": prefill,
            "decode": decode(a.vllm_rows, shared=False),
            "scoring": products(a.prompt_tokens + answered, answered),
        },
    }
    for parts in ways.values():
        parts["host"] = sum(parts.values()) * a.launch_gaps / (1 - a.launch_gaps) + a.input_s
    return ways


def costs(a: Assumptions) -> dict[str, Any]:
    """Hours and dollars of the whole data set, and what they were computed from."""
    ways = {}
    for name, parts in seconds_a_question(a).items():
        hours = sum(parts.values()) * a.questions / a.gpus / 3600
        ways[name] = {
            "hours": round(hours, 2),
            "dollars": round(hours * a.gpus * a.price, 2),
            "milliseconds_a_question": {part: round(s * 1e3, 1) for part, s in parts.items()},
        }
    sources = {each.name: each.metadata["source"] for each in fields(a)}
    return {
        "computed_not_measured": True,
        "ways": ways,
        "assumptions": {
            name: {"value": value, "source": sources[name]} for name, value in asdict(a).items()
        },
        "counted": {"language_model_tokens": counted_tokens()[0], "file": COUNTED.name},
    }


def page(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    lines = ["COMPUTED, NOT MEASURED (no GPU made these figures)", ""]
    lines.append(f"{'way':<12}{'hours':>8}{'dollars':>10}   ms a question and GPU, by part")
    for name, way in result["ways"].items():
        parts = "  ".join(f"{p} {ms:g}" for p, ms in way["milliseconds_a_question"].items())
        lines.append(f"{name:<12}{way['hours']:>8.2f}{way['dollars']:>10.2f}   {parts}")
    lines += ["", "assumed (each is a flag):"]
    for name, each in result["assumptions"].items():
        lines.append(f"  --{name:<17}{each['value']:<12g}{each['source']}")
    counted = result["counted"]
    tokens = f"{counted['language_model_tokens']:g} tokens a question and model"
    lines += ["", f"counted: {tokens} ({counted['file']})"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cost", description=__doc__)
    parser.add_argument("--json", action="store_true")
    for each in fields(Assumptions):
        parser.add_argument(
            f"--{each.name}", type=float, default=each.default, help=each.metadata["source"]
        )
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    result = costs(Assumptions(**arguments))
    print(json.dumps(result, indent=1) if as_json else page(result))


if __name__ == "__main__":
    main()
