"""The training loop that all demo checkpoints share: AdamW, warm-up and cosine decay, one core."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.05,
    log_every: int = 50,
) -> None:
    """Minimise `loss_of_step(step)` over `steps` steps; the rate falls to a twentieth of `lr`."""
    optimizer = torch.optim.AdamW(
        list(_parameter_groups(model, weight_decay)), lr=lr, betas=(0.9, 0.98)
    )
    start, losses = time.monotonic(), []
    model.train()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        scale = min(1.0, (step + 1) / warmup) * (0.525 + 0.475 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % log_every == 0:
            mean = sum(losses[-log_every:]) / log_every
            seconds = time.monotonic() - start
            logger.info("step %d/%d loss %.4f (%.0f s)", step + 1, steps, mean, seconds)
    model.eval()


def arguments(description: str, *, steps: int) -> argparse.ArgumentParser:
    """The command line that all training scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder that holds all checkpoints")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Logging, one thread and the seed of a training script."""
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    return args


def _parameter_groups(model: nn.Module, weight_decay: float) -> Iterable[dict]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    yield {"params": matrices, "weight_decay": weight_decay}
    yield {"params": vectors, "weight_decay": 0.0}
