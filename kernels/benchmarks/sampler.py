"""sample against transformers' processors and multinomial, each with the token's log-prob.

Target: 6x faster on CPU at [10, 32000] and [160, 32000]; on CUDA at most 2.5 times the time that
reading the logits once takes, at [320, 32000] and [320, 152064].
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from rounds import Form, Size, copy_bandwidth, interleave, milliseconds, of_size, ratio
from stream_kernels import sample, uniforms
from stream_kernels.forms import INTERPRETED, takes_triton
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

CPU_SHAPES = [(10, 32_000), (160, 32_000), (10, 152_064)]
CUDA_SHAPES = [(320, 32_000), (320, 152_064)]
TINY = (2, 300)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
]


def measure(device: str, rounds: int, size: Size) -> Iterator[dict[str, object]]:
    """One row a shape (rows, vocabulary) and setting."""
    shapes = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    on_card = takes_triton(torch.device(device))
    bandwidth = copy_bandwidth(device, 1 << (20 if size == "tiny" else 30)) if on_card else None
    for shape in of_size(shapes, TINY, size, quick=2):
        for settings in SETTINGS:
            yield measure_shape(*shape, settings, device, rounds, bandwidth)


def measure_shape(
    num_rows: int,
    vocab_size: int,
    settings: dict[str, Any],
    device: str,
    rounds: int,
    bandwidth: float | None,
) -> dict[str, object]:
    """Times and ratios; on CUDA the inputs rotate, so that no call finds its logits in L2.

    Float32 logits, which are what the engine samples from on every device.
    """
    copies = 8 if device == "cuda" else 1
    logits = torch.randn(copies, num_rows, vocab_size, device=device) * 3
    seeds = torch.arange(num_rows, device=device)
    points = uniforms(seeds, torch.zeros_like(seeds))
    process = hf_processors(settings)
    forms: dict[str, Form] = {
        "sample": lambda call: sample(logits[call % copies], points, **settings),
        "transformers": lambda call: hf_sample(logits[call % copies], process),
    }
    if settings.keys() == {"temperature"}:
        forms["exponential_trick"] = lambda call: exponential_sample(
            logits[call % copies], settings["temperature"]
        )
    calls = 16 if device == "cuda" else max(1, 1_600_000 // (num_rows * vocab_size))
    calls = 1 if INTERPRETED else calls
    times = interleave(forms, rounds=rounds, device=device, calls=calls)
    row: dict[str, object] = {
        "shape": {"rows": num_rows, "vocabulary": vocab_size},
        "settings": settings,
        "faster_than": {name: ratio(times, name, "sample") for name in forms if name != "sample"},
        "max_logp_error": logp_error(logits[0], points, settings),
        "milliseconds": milliseconds(times),
    }
    if bandwidth is not None:
        floor_s = logits[0].numel() * logits.element_size() / bandwidth
        row["floor_milliseconds"] = round(floor_s * 1e3, 4)
        row["over_floor"] = round(sorted(times["sample"])[rounds // 2] / floor_s, 2)
    return row


def hf_processors(settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """transformers' logits processors in generate's order."""
    warpers: list[Any] = [TemperatureLogitsWarper(settings["temperature"])]
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))

    def process(scores: Tensor) -> Tensor:
        for warper in warpers:
            scores = warper(None, scores)
        return scores

    return process


def hf_sample(logits: Tensor, process: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """generate's step, and the log-prob that a reward needs."""
    logits = logits.float()
    tokens = torch.multinomial(torch.softmax(process(logits), dim=-1), num_samples=1)
    return tokens, torch.log_softmax(logits, dim=-1).gather(1, tokens)


def exponential_sample(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """gpt-fast's form: argmax of probabilities over exponential noise."""
    logits = logits.float()
    probs = torch.softmax(logits / temperature, dim=-1)
    tokens = (probs / torch.empty_like(probs).exponential_(1)).argmax(dim=-1, keepdim=True)
    return tokens, torch.log_softmax(logits, dim=-1).gather(1, tokens)


def logp_error(logits: Tensor, points: Tensor, settings: dict[str, Any]) -> float:
    """The largest difference of the log-probs from float64."""
    tokens, logps = sample(logits[:16], points[:16], **settings)
    exact = torch.log_softmax(logits[:16].double(), dim=-1).gather(1, tokens[:, None])[:, 0]
    return float((logps - exact).abs().max())
