"""Train the demo's reward model: a DPO-trained descendant of the instruct model.

    python -m tests.demo_training.reward --out /tmp/demo        (after training.instruct)

Pairs are two hallucinating answers to one question; the one with fewer wrong facts is chosen. The
loss is DPO's (Rafailov et al. 2023): -log sigmoid(beta * (chosen margin - rejected margin)), each
margin being the summed log-prob under the model minus that under the instruct model.
"""

from __future__ import annotations

import random

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.facts import count_wrong_facts
from stream_engine.demo.world import Scene, draw, random_question, random_scene
from tests.demo_training import loop
from tests.demo_training.answers import write_answer
from tests.demo_training.instruct import ERROR_RATE

NUM_PAIRS = 32
BETA = 0.1


def write_pair(scene: Scene, question: str, rng: random.Random) -> tuple[str, str] | None:
    """A chosen and a rejected answer; None if the two drawn are equally wrong."""
    answers = [write_answer(scene, question, rng, error_rate=ERROR_RATE) for _ in range(2)]
    wrong = [count_wrong_facts(scene, question, answer) for answer in answers]
    if wrong[0] == wrong[1]:
        return None
    return (answers[0], answers[1]) if wrong[0] < wrong[1] else (answers[1], answers[0])


def main() -> None:
    args = loop.start(loop.arguments(__doc__ or "", steps=400))
    reference = vlm.load_checkpoint(args.out / "instruct").eval()
    model = vlm.load_checkpoint(args.out / "instruct")
    model.freeze_vision()
    rng = random.Random(f"reward:{args.seed}")

    def loss_of_step(step: int) -> Tensor:
        images: list[Image.Image] = []
        texts: list[tuple[str, str]] = []
        while len(images) < NUM_PAIRS:
            scene = random_scene(rng)
            question = random_question(scene, rng)
            if pair := write_pair(scene, question, rng):
                images.append(draw(scene, rng))
                texts += [(question, answer) for answer in pair]
        pixels = vlm.to_pixels(images)
        suffix_ids, labels = model.batch(texts)
        with torch.no_grad():
            ref_logps = reference(pixels, suffix_ids, labels).sum(1)
        margins = model(pixels, suffix_ids, labels).sum(1) - ref_logps
        return -functional.logsigmoid(BETA * (margins[0::2] - margins[1::2])).mean()

    loop.train(model, loss_of_step, steps=args.steps, lr=5e-4)
    vlm.save_checkpoint(model, args.out / "vlm_tokenizer", args.out / "reward")


if __name__ == "__main__":
    main()
