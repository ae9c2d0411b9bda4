"""Close the loop: train the demo's instruct model on the pairs of a run, and count what it gets
wrong before and after, on pictures that no run has seen.

The loss is DPO's (Rafailov et al. 2023), with RPO's term: the likelihood of the chosen answer. It
is written out in plain torch, and equals TRL's `DPOConfig(loss_type=["sigmoid", "sft"],
loss_weights=[1.0, rpo_alpha])`; TRL itself is not needed.

Wrong facts per answer on 100 held-out pictures, 1.73 before, after 150 steps on the pairs of
dpo_reward: 0.24 at a learning rate of 1e-4 and 0.34 at 3e-4; without RPO's term (`--rpo_alpha 0`)
1.02 and 2.41, more than before.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stream_engine.demo import checkpoint_path
from stream_engine.demo.facts import count_wrong_facts
from stream_engine.demo.tiny_llava import (
    IGNORE,
    TinyLlava,
    load_checkpoint,
    save_checkpoint,
    to_pixels,
)
from stream_engine.demo.world import make_picture, scene_of
from stream_engine.errors import ConfigError
from stream_engine.records import DatasetPair

HELD_OUT_SEED = 977  # of the pictures that are counted on
BATCH_SIZE = 16  # pairs in a step
WARMUP_STEPS = 10
REPORT_EVERY = 50


class LoopSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is trained, and on how many answers it is judged."""

    steps: int = 150
    learning_rate: float = 1e-4
    beta: float = 0.1
    rpo_alpha: float = 1.0
    """Weight of the likelihood of the chosen answer; 0 is plain DPO."""
    pictures: int = 100
    """How many pictures are held out."""
    answers: int = 5
    """Answers to each, at the temperature of a run."""
    seed: int = 0


class LoopReport(msgspec.Struct, frozen=True, kw_only=True):
    """Wrong facts per answer of the instruct model, before and after training on the pairs."""

    pairs: int
    wrong_facts_before: float
    wrong_facts_after: float


def close_loop(
    dataset: Iterable[DatasetPair],
    settings: LoopSettings,
    *,
    start: Path | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> LoopReport:
    """Train on the pairs of the split `train`; `out` gets the model as a checkpoint for a run.

    `start` is such a checkpoint, to train from; default: the demo's instruct model.

    Raises:
        ConfigError: when there is no pair, or one is not of the demo world.
    """
    pairs = [pair for pair in dataset if pair.split == "train"]
    if not pairs:
        raise ConfigError("no pair to train on")
    for pair in pairs:
        scene_of(pair.idx)
    torch.manual_seed(settings.seed)
    model = load_checkpoint(start or checkpoint_path("instruct"))
    before = wrong_facts(model, settings)
    say(f"before: {before:.2f} wrong facts per answer")
    train(model, pairs, settings, say=say)
    after = wrong_facts(model, settings)
    say(f"after:  {after:.2f} wrong facts per answer")
    if out is not None:
        save_checkpoint(model, checkpoint_path("instruct"), out)
    return LoopReport(pairs=len(pairs), wrong_facts_before=before, wrong_facts_after=after)


def train(
    model: TinyLlava,
    pairs: Sequence[DatasetPair],
    settings: LoopSettings,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """DPO steps over the pairs in random order, against the model as it was; the vision tower stays
    as it is."""
    reference = copy.deepcopy(model).eval()
    model.freeze_vision()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.98))
    rng = random.Random(settings.seed)
    model.train()
    for step in range(settings.steps):
        batch = rng.sample(pairs, min(BATCH_SIZE, len(pairs)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        loss = loss_of(model, reference, batch, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == settings.steps:
            say(f"step {step + 1}/{settings.steps}: loss {loss.item():.3f}")
    model.eval()


def loss_of(
    model: TinyLlava, reference: TinyLlava, batch: Sequence[DatasetPair], settings: LoopSettings
) -> Tensor:
    """-log sigmoid(beta * (margin of chosen - margin of rejected)) - rpo_alpha * log p(chosen)."""
    pixels = to_pixels([picture_of(pair) for pair in batch])
    texts = [(pair.question, answer) for pair in batch for answer in (pair.chosen, pair.rejected)]
    suffix_ids, labels = model.batch(texts)
    with torch.no_grad():
        ref_logps = reference(pixels, suffix_ids, labels).sum(1)
    token_logps = model(pixels, suffix_ids, labels)  # [2 pairs, S-1], 0 outside of the answers
    return dpo_loss(
        token_logps, ref_logps, labels[:, 1:] != IGNORE, settings.beta, settings.rpo_alpha
    )


def dpo_loss(
    token_logps: Tensor, ref_logps: Tensor, is_answer: Tensor, beta: float, rpo_alpha: float
) -> Tensor:
    """The loss of rows that are chosen and rejected in turn.

    Args:
        token_logps: [N, S] of the model, 0 where not `is_answer`.
        ref_logps: [N], the reference model's sums.
    """
    margins = token_logps.sum(1) - ref_logps
    preference = -functional.logsigmoid(beta * (margins[0::2] - margins[1::2])).mean()
    likelihood = token_logps[0::2].sum() / is_answer[0::2].sum()
    return preference - rpo_alpha * likelihood


def picture_of(pair: DatasetPair) -> Image.Image:
    """The pair's picture, decoded."""
    return Image.open(io.BytesIO(pair.images[0].data)).convert("RGB")


def wrong_facts(model: TinyLlava, settings: LoopSettings) -> float:
    """Wrong facts per sampled answer, over pictures that no run has seen."""
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    wrong = 0
    for number in range(settings.pictures):
        picture = make_picture(HELD_OUT_SEED, number)
        pixels = to_pixels([Image.open(io.BytesIO(picture.png)).convert("RGB")])[0]
        rows = model.sample(
            pixels,
            picture.question,
            count=settings.answers,
            temperature=0.7,
            generator=generator,
        )
        answers = [model.text(row) for row in rows]
        wrong += sum(count_wrong_facts(picture.scene, picture.question, a) for a in answers)
    return wrong / (settings.pictures * settings.answers)
