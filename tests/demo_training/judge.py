"""Train the demo's judge: it says whether a fact is true of a picture.

    python -m tests.demo_training.judge --out /tmp/demo     (after training.base)

Questions are those that the text model makes of the facts of hallucinating answers.
"""

from __future__ import annotations

import random

from torch import Tensor

from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.world import draw, random_scene
from tests.demo_training import loop
from tests.demo_training.drills import write_yes_no

NUM_IMAGES = 16
QUESTIONS_PER_IMAGE = 8


def main() -> None:
    args = loop.start(loop.arguments(__doc__ or "", steps=1000))
    model = vlm.load_checkpoint(args.out / "base")
    model.freeze_vision()
    rng = random.Random(f"judge:{args.seed}")

    def loss_of_step(step: int) -> Tensor:
        scenes = [random_scene(rng) for _ in range(NUM_IMAGES)]
        pixels = vlm.to_pixels([draw(scene, rng) for scene in scenes])
        texts = [write_yes_no(scene, rng) for scene in scenes for _ in range(QUESTIONS_PER_IMAGE)]
        return model.mean_loss(pixels, texts)

    loop.train(model, loss_of_step, steps=args.steps, lr=1e-3)
    vlm.save_checkpoint(model, args.out / "vlm_tokenizer", args.out / "judge")


if __name__ == "__main__":
    main()
