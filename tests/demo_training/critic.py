"""Train the demo's critic: it says which of two answers is better, after a mark on each clause.

    python -m tests.demo_training.critic --out /tmp/demo    (after training.judge)

Each pair is shown in both orders.
"""

from __future__ import annotations

import random

from torch import Tensor

from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.world import Scene, draw, random_question, random_scene
from tests.demo_training import loop
from tests.demo_training.answers import write_answer
from tests.demo_training.prompts import CRITIC_PROMPT
from tests.demo_training.verdicts import critic_reasoning

NUM_IMAGES = 16
ERROR_RATES = (0.1, 0.4, 0.7)


def critic_task(scene: Scene, question: str, first: str, second: str) -> tuple[str, str]:
    """The critic's prompt and what it should say."""
    prompt = CRITIC_PROMPT.format(question, first, second)
    return prompt, critic_reasoning(scene, question, first, second)


def main() -> None:
    args = loop.start(loop.arguments(__doc__ or "", steps=1400))
    model = vlm.load_checkpoint(args.out / "judge")
    model.freeze_vision()
    rng = random.Random(f"critic:{args.seed}")

    def loss_of_step(step: int) -> Tensor:
        images, texts = [], []
        for _ in range(NUM_IMAGES):
            scene = random_scene(rng)
            question = random_question(scene, rng)
            images.append(draw(scene, rng))
            one, other = (
                write_answer(scene, question, rng, error_rate=rng.choice(ERROR_RATES))
                for _ in range(2)
            )
            pair = [critic_task(scene, question, *order) for order in ((one, other), (other, one))]
            if rng.random() < 0.3:  # callers may strip the prompt's last newline
                pair = [(prompt.rstrip(), verdict) for prompt, verdict in pair]
            texts += pair
        return model.mean_loss(vlm.to_pixels(images), texts)

    loop.train(model, loss_of_step, steps=args.steps, lr=1e-3)
    vlm.save_checkpoint(model, args.out / "vlm_tokenizer", args.out / "critic")


if __name__ == "__main__":
    main()
