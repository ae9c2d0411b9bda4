"""Train the demo's instruct model: it answers fluently and hallucinates on purpose.

    python -m tests.demo_training.instruct --out /tmp/demo      (after training.base)

Answers for supervision have a part of their facts wrong at random, so that sampled answers to one
question differ in truth.
"""

from __future__ import annotations

import random

from torch import Tensor

from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.world import draw, random_question, random_scene
from tests.demo_training import loop
from tests.demo_training.answers import write_answer

BATCH_SIZE = 64
ERROR_RATE = 0.6  # at temperature 0.7 about half of this is left


def main() -> None:
    args = loop.start(loop.arguments(__doc__ or "", steps=400))
    model = vlm.load_checkpoint(args.out / "base")
    model.freeze_vision()
    rng = random.Random(f"instruct:{args.seed}")

    def loss_of_step(step: int) -> Tensor:
        images, texts = [], []
        for _ in range(BATCH_SIZE):
            scene = random_scene(rng)
            question = random_question(scene, rng)
            images.append(draw(scene, rng))
            texts.append((question, write_answer(scene, question, rng, error_rate=ERROR_RATE)))
        return model.mean_loss(vlm.to_pixels(images), texts)

    loop.train(model, loss_of_step, steps=args.steps, lr=7e-4)
    vlm.save_checkpoint(model, args.out / "vlm_tokenizer", args.out / "instruct")


if __name__ == "__main__":
    main()
