"""Close the loop: train the demo's instruct model on the pairs of a run, and count what it gets
wrong before and after, on pictures that no run has seen.

The loss is DPO's (Rafailov et al. 2023) or another of TRL's (`losses.py`), with RPO's term: the
likelihood of the chosen answer. It equals TRL's `DPOConfig(loss_type=[loss, "sft"],
loss_weights=[1.0, rpo_alpha])`.

Wrong facts per answer on 100 held-out pictures, 1.74 before, after 150 steps on the pairs of
dpo_reward at a learning rate of 1e-4, mean of three seeds: 0.23; with `--beta 0.5` 0.22; without
RPO's term (`--rpo_alpha 0`) 1.23, and 0.28 with `--beta 0.5`. At 3e-4 these are 0.30, 0.34, 2.26
and 0.48.
"""

from __future__ import annotations

import copy
import io
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from PIL import Image
from torch import Tensor

from stream_engine.demo import checkpoint_path
from stream_engine.demo.facts import count_wrong_facts
from stream_engine.demo.losses import LossSettings, check_loss, preference_loss
from stream_engine.demo.tiny_llava import (
    IGNORE,
    TinyLlava,
    load_checkpoint,
    save_checkpoint,
    to_pixels,
)
from stream_engine.demo.world import Picture, make_picture, scene_of
from stream_engine.errors import ConfigError
from stream_engine.records import DatasetPair

HELD_OUT_SEED = 977  # of the pictures that are counted on
BATCH_SIZE = 16  # pairs in a step
WARMUP_STEPS = 10
REPORT_EVERY = 50
RECENT_STEPS = 10  # over which the chosen answers' gain is a mean


class LoopSettings(LossSettings, frozen=True, kw_only=True):
    """How the model is trained, and on how many answers it is judged."""

    steps: int = 150
    learning_rate: float = 1e-4
    stop_drop: float | None = None
    """Stop when the chosen answers have lost this much log-prob, in nats per token, against the
    reference model (mean of RECENT_STEPS steps); None: never."""
    pictures: int = 100
    """How many pictures are held out."""
    answers: int = 5
    """Answers to each, at the temperature of a run."""
    seed: int = 0


class LoopReport(msgspec.Struct, frozen=True, kw_only=True):
    """Wrong facts per answer of the instruct model, before and after training on the pairs."""

    pairs: int
    steps: int
    """Those made: fewer than asked for where `stop_drop` ended the training."""
    chosen_gain: float
    """Log-prob that the chosen answers have won by the last steps, in nats per token."""
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
        ConfigError: when there is no pair, one is not of the demo world, or the loss is unknown.
    """
    check_loss(settings)
    pairs = [pair for pair in dataset if pair.split == "train"]
    if not pairs:
        raise ConfigError("no pair to train on")
    for pair in pairs:
        scene_of(pair.idx)
    torch.manual_seed(settings.seed)
    model = load_checkpoint(start or checkpoint_path("instruct"))
    before = wrong_facts(model, settings)
    say(f"before: {before:.2f} wrong facts per answer")
    gains = train(model, pairs, settings, say=say)
    after = wrong_facts(model, settings)
    say(f"after:  {after:.2f} wrong facts per answer")
    if out is not None:
        save_checkpoint(model, checkpoint_path("instruct"), out)
    return LoopReport(
        pairs=len(pairs),
        steps=len(gains),
        chosen_gain=statistics.fmean(gains[-RECENT_STEPS:]),
        wrong_facts_before=before,
        wrong_facts_after=after,
    )


def train(
    model: TinyLlava,
    pairs: Sequence[DatasetPair],
    settings: LoopSettings,
    *,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Steps over the pairs in random order, against the model as it was; the vision tower stays as
    it is.

    Returns for each step the log-prob that its chosen answers have won against the reference
    model, in nats per token.
    """
    reference = Reference(copy.deepcopy(model))
    model.freeze_vision()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.98))
    rng = random.Random(settings.seed)
    gains: list[float] = []
    model.train()
    for step in range(settings.steps):
        batch = rng.sample(pairs, min(BATCH_SIZE, len(pairs)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        loss, gain = loss_of(model, reference, batch, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        gains.append(gain)
        recent = statistics.fmean(gains[-RECENT_STEPS:])
        is_spent = settings.stop_drop is not None and (
            len(gains) >= RECENT_STEPS and recent <= -settings.stop_drop
        )
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == settings.steps or is_spent:
            say(f"step {step + 1}/{settings.steps}: loss {loss.item():.3f}")
        if is_spent:
            say(f"stopped: the chosen answers have lost {-recent:.3f} per token")
            break
    model.eval()
    return gains


class Reference:
    """The model as it was, and what it says of the pairs that it was asked about."""

    def __init__(self, model: TinyLlava) -> None:
        self.model = model.eval()
        self.known: dict[tuple[str, str, str], Tensor] = {}

    @torch.no_grad()
    def logps(self, batch: Sequence[DatasetPair]) -> Tensor:
        """Sums [2 pairs] over the tokens of the chosen and the rejected answers in turn."""
        keys = [(pair.idx, pair.chosen, pair.rejected) for pair in batch]
        if new := {key: pair for key, pair in zip(keys, batch) if key not in self.known}:
            sums = self.model(*tensors_of(self.model, list(new.values()))).sum(1)
            self.known.update(zip(new, sums.view(-1, 2)))
        return torch.cat([self.known[key] for key in keys])


def tensors_of(model: TinyLlava, batch: Sequence[DatasetPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [pairs, 3, 48, 48], ids and labels [2 pairs, S] of chosen and rejected in turn."""
    pixels = to_pixels([picture_of(pair) for pair in batch])
    texts = [(pair.question, answer) for pair in batch for answer in (pair.chosen, pair.rejected)]
    return pixels, *model.batch(texts)


def loss_of(
    model: TinyLlava, reference: Reference, batch: Sequence[DatasetPair], settings: LossSettings
) -> tuple[Tensor, float]:
    """The loss of a batch, and the log-prob per token that its chosen answers have won."""
    pixels, suffix_ids, labels = tensors_of(model, batch)
    ref_logps = reference.logps(batch)
    token_logps = model(pixels, suffix_ids, labels)  # [2 pairs, S-1], 0 outside of the answers
    is_answer = labels[:, 1:] != IGNORE
    loss = preference_loss(token_logps, ref_logps, is_answer, settings)
    gain = (token_logps.detach().sum(1) - ref_logps)[0::2].sum() / is_answer[0::2].sum()
    return loss, float(gain)


def picture_of(pair: DatasetPair) -> Image.Image:
    """The pair's picture, decoded."""
    return Image.open(io.BytesIO(pair.images[0].data)).convert("RGB")


def wrong_facts(model: TinyLlava, settings: LoopSettings) -> float:
    """Wrong facts per sampled answer, over pictures that no run has seen."""
    wrong = [
        count_wrong_facts(picture.scene, picture.question, answer)
        for picture, answers in sampled_answers(model, settings)
        for answer in answers
    ]
    return statistics.fmean(wrong)


def sampled_answers(
    model: TinyLlava, settings: LoopSettings, *, first: int = 0
) -> Iterator[tuple[Picture, list[str]]]:
    """The held-out pictures from number `first` on, each with what the model says of it; those with
    prompts of equal length at once."""
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    by_length: dict[int, list[tuple[Picture, list[int]]]] = {}
    for number in range(first, first + settings.pictures):
        picture = make_picture(HELD_OUT_SEED, number)
        ids, length = model.suffix(picture.question)
        by_length.setdefault(length, []).append((picture, ids))
    for group in by_length.values():
        opened = [Image.open(io.BytesIO(picture.png)).convert("RGB") for picture, _ in group]
        rows = model.sample_each(
            to_pixels(opened),
            torch.tensor([ids for _, ids in group]),
            count=settings.answers,
            temperature=0.7,
            generator=generator,
        )
        answers = [model.text(row) for row in rows]
        for place, (picture, _) in enumerate(group):
            start = place * settings.answers
            yield picture, answers[start : start + settings.answers]
