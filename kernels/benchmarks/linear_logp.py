"""linear_logp against the plain product that it contains, and against what people write instead.

Target: float32 on CPU within 1.08 of the fastest plain product with at most 16 MiB extra; on CUDA
bfloat16 at 0.80 of cuBLAS or better, with at most 1 % of the logits' bytes extra.
"""

import sys
from collections.abc import Iterator

import torch
from rounds import Form, Size, extra_mib, interleave, milliseconds, of_size, ratio
from stream_kernels import linear_logp
from stream_kernels.forms import takes_triton
from stream_kernels.gemm import linear
from torch import Tensor
from torch.nn import functional

CPU_SHAPES = [
    (64, 1024, 32_000),
    (1024, 1024, 32_000),
    (64, 4096, 32_000),
    (1024, 4096, 32_000),
    (64, 1024, 128_256),
    (1024, 1024, 128_256),
    (64, 4096, 128_256),
    (1024, 4096, 128_256),
]
LARGE = 1 << 33
"""Multiplications from which on only the products are measured on CPU: others take minutes."""
CUDA_SHAPES = [
    (1500, 4096, 32_000),
    (2048, 4096, 128_256),
    (1500, 3584, 152_064),
    (256, 4096, 32_000),
]
TINY = (16, 64, 300)


def measure(device: str, rounds: int, size: Size) -> Iterator[dict[str, object]]:
    """One row a shape (tokens, hidden size, vocabulary)."""
    shapes = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    for shape in of_size(shapes, TINY, size, quick=2):
        yield measure_shape(*shape, device, rounds)


def measure_shape(
    num_tokens: int, size: int, vocab_size: int, device: str, rounds: int
) -> dict[str, object]:
    """Times, ratios, memory and error of one shape."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(num_tokens, size, device=device).to(dtype)
    weight = (torch.randn(vocab_size, size, device=device) * 3 / size**0.5).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    forms: dict[str, Form] = {
        "torch_product": lambda call: functional.linear(hidden, weight),
        "best_product": lambda call: linear(hidden, weight),
        "linear_logp": lambda call: linear_logp(hidden, weight, targets),
    }
    if device == "cuda" or num_tokens * size * vocab_size <= LARGE:
        forms["log_softmax_gather"] = lambda call: naive_logp(hidden, weight, targets)
        forms |= trl_forms(hidden, weight, targets)
    if hasattr(functional, "linear_cross_entropy") and num_tokens * size <= 1024 * 1024:
        forms["torch_linear_cross_entropy"] = lambda call: functional.linear_cross_entropy(
            hidden, weight, targets, reduction="none"
        )
    if takes_triton(hidden.device):
        forms |= fused_forms(hidden, weight, targets)
    times = interleave(forms, rounds=rounds, device=device, calls=5 if device == "cuda" else 1)
    products = ("torch_product", "best_product")
    ours = [name for name in forms if name.startswith("linear_logp")]
    checked = slice(0, 64)
    exact = torch.log_softmax(hidden[checked].double() @ weight.double().T, dim=1)
    exact = exact.gather(1, targets[checked, None])[:, 0]
    results = {
        "linear_logp": linear_logp(hidden, weight, targets),
        "log_softmax_gather": naive_logp(hidden, weight, targets),
    }
    return {
        "shape": {"tokens": num_tokens, "hidden": size, "vocabulary": vocab_size},
        "dtype": str(dtype),
        "over_fastest_product": {
            name: ratio(times, name, *products) for name in times if name not in products
        },
        "torch_product_over_best": ratio(times, "torch_product", *products),
        "extra_mib": {name: extra_mib(forms[name], device) for name in ours},
        "logits_mib": round(num_tokens * vocab_size * 4 / 2**20, 1),
        "max_error": {
            name: float((logps[checked] - exact).abs().max()) for name, logps in results.items()
        },
        "milliseconds": milliseconds(times),
    }


def naive_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What users run: all logits, their log_softmax, one column of it."""
    logits = functional.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]


def trl_forms(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Form]:
    """TRL's own function, where TRL is installed."""
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError as error:
        print(f"trl_selective is not measured: {error}", file=sys.stderr)
        return {}
    return {
        "trl_selective": lambda call: selective_log_softmax(
            functional.linear(hidden, weight)[None], targets[None]
        )
    }


def fused_forms(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Form]:
    """The Triton kernel in the tile sizes worth trying."""
    from stream_kernels.gpu.linear_logp import linear_logp_fused

    tiles: dict[str, dict[str, int]] = {
        "128x256s3": {"block_n": 128, "block_v": 256, "num_warps": 8, "num_stages": 3},
        "128x256s4": {"block_n": 128, "block_v": 256, "num_warps": 8, "num_stages": 4},
        "128x128s3": {"block_n": 128, "block_v": 128, "num_warps": 8, "num_stages": 3},
        "64x256s3": {"block_n": 64, "block_v": 256, "num_warps": 4, "num_stages": 3},
    }

    def form(tile: dict[str, int]) -> Form:
        return lambda call: linear_logp_fused(
            hidden,
            weight,
            targets,
            block_n=tile["block_n"],
            block_v=tile["block_v"],
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
        )

    return {f"linear_logp_fused_{name}": form(tile) for name, tile in tiles.items()}
