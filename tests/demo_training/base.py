"""Train the truthful model that the other vision-language checkpoints start from.

    python -m tests.demo_training.base --out /tmp/demo

First the vision tower is aligned with words, much as real towers come trained; without that, a
small model learns to describe places but hardly to find a shape or to check a claim. Then the whole
model learns to answer questions truthfully and to check single facts. It is not a checkpoint of
the package: nothing at run time needs it.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional

from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.world import COLOURS, SHAPES, Scene, draw, random_question, random_scene
from tests.demo_training import loop
from tests.demo_training.answers import write_answer
from tests.demo_training.drills import write_drill
from tests.demo_training.tokenizer import train_vlm_tokenizer

TOWER_STEPS = 1500
TOWER_IMAGES = 48
ALIGNMENT_SCALE = 4.0
NUM_IMAGES = 16
LONG_PER_IMAGE = 2
SHORT_PER_IMAGE = 6


def patch_labels(scene: Scene) -> tuple[list[int], list[int]]:
    """Colour and shape (0: none) of the item in whose place each patch lies, row by row."""
    side = round(vlm.IMAGE_TOKENS**0.5)
    items = [
        scene.items[2 * (row * 2 // side) + column * 2 // side]
        for row in range(side)
        for column in range(side)
    ]
    colours = [0 if item is None else 1 + list(COLOURS).index(item.colour) for item in items]
    shapes = [0 if item is None else 1 + SHAPES.index(item.shape) for item in items]
    return colours, shapes


def train_tower(model: vlm.TinyLlava, rng: random.Random) -> None:
    """Align patches with words, as CLIP is: a patch should point to its colour and its shape.

    The scores of a patch are dot products of what the projector makes of it with the language
    model's own embeddings of the words, so that finding "circle" in a picture is a short step.
    """
    embeddings = model.lm.model.embed_tokens
    vocabularies = [
        torch.tensor([model.word_id(word) for word in ("nothing", *words)])
        for words in (COLOURS, SHAPES)
    ]

    def loss_of_step(step: int) -> Tensor:
        scenes = [random_scene(rng) for _ in range(TOWER_IMAGES)]
        pixels = vlm.to_pixels([draw(scene, rng) for scene in scenes])
        features = model.projector(model.tower_features(pixels))
        labels = torch.tensor([patch_labels(scene) for scene in scenes])  # [B, 2, I]
        return sum(
            (
                functional.cross_entropy(
                    (ALIGNMENT_SCALE * features @ embeddings(words).T).flatten(0, 1),
                    labels[:, i].flatten(),
                )
                for i, words in enumerate(vocabularies)
            ),
            start=torch.zeros(()),
        )

    nn.init.normal_(embeddings.weight, std=0.1)  # as large as features: neither drowns the other
    parts = nn.ModuleList([model.tower, model.projector, embeddings])
    loop.train(parts, loss_of_step, steps=TOWER_STEPS, lr=2e-3)
    parts.requires_grad_(False)  # else the language model undoes it before it has found its use


def main() -> None:
    args = loop.start(loop.arguments(__doc__ or "", steps=1500))
    tokenizer_folder = args.out / "vlm_tokenizer"
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    model = vlm.TinyLlava(train_vlm_tokenizer(tokenizer_folder))
    rng = random.Random(f"base:{args.seed}")
    train_tower(model, rng)

    def loss_of_step(step: int) -> Tensor:
        scenes = [random_scene(rng) for _ in range(NUM_IMAGES)]
        pixels = vlm.to_pixels([draw(scene, rng) for scene in scenes])
        questions = [
            (scene, random_question(scene, rng)) for scene in scenes for _ in range(LONG_PER_IMAGE)
        ]
        long = [(question, write_answer(scene, question, rng)) for scene, question in questions]
        short = [write_drill(scene, rng) for scene in scenes for _ in range(SHORT_PER_IMAGE)]
        return model.mean_loss(pixels, long) + model.mean_loss(pixels, short)

    loop.train(model, loss_of_step, steps=args.steps, lr=2e-3)
    vlm.save_checkpoint(model, tokenizer_folder, args.out / "base")


if __name__ == "__main__":
    main()
