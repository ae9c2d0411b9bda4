"""Short questions with short true answers, many to a picture.

Long answers teach a model where to look for a place, but hardly how to find a shape ("what colour
is the circle?"). Short ones do, and cost little: a picture is read once for all its questions.
"""

from __future__ import annotations

import random

from stream_engine.demo.facts import ColourFact, CountFact, Fact, PlaceFact, PresenceFact, render
from stream_engine.demo.world import COLOURS, PLACES, Item, Scene, random_item
from tests.demo_training.answers import corrupt
from tests.demo_training.verdicts import yes_no, yes_no_prompt

YES_NO_SHARE = 0.5


def single_items(scene: Scene) -> list[Item]:
    """The items whose kind of shape stands once in the picture."""
    shapes = [item.shape for item in scene.shapes()]
    return [item for item in scene.shapes() if shapes.count(item.shape) == 1]


def random_fact(scene: Scene, rng: random.Random, *, true_share: float = 0.5) -> Fact:
    """A fact of any kind about the scene; false ones are often near misses."""
    is_true = rng.random() < true_share
    kind = rng.choice(("place", "place", "colour", "presence", "count"))
    single = single_items(scene)
    if kind == "colour" and single:
        item = rng.choice(single)
        colours = [c for c in COLOURS if c != item.colour]
        # A colour that another shape of the picture has is the harder mistake.
        colours += [i.colour for i in scene.shapes() if i.colour != item.colour] * 3
        return ColourFact(item.shape, item.colour if is_true else rng.choice(colours))
    if kind == "presence":
        item = rng.choice(scene.shapes())
        if rng.random() < 0.5:
            near = Item(item.colour, rng.choice(scene.shapes()).shape)
            item = rng.choice((near, random_item(rng)))
        return PresenceFact(item, (item in scene.items) == is_true)
    if kind == "count":
        number = len(scene.shapes())
        wrong = [n for n in (1, 2, 3, 4) if n != number]
        return CountFact(number if is_true else rng.choice(wrong))
    fact = PlaceFact(rng.choice(PLACES), None)
    fact = PlaceFact(fact.place, scene.at(fact.place))
    if is_true:
        return fact
    moved = PlaceFact(fact.place, scene.at(rng.choice(PLACES)))
    return moved if rng.random() < 0.3 and moved != fact else corrupt(fact, rng)


def write_yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The judge's question about a fact, and the true verdict."""
    fact = random_fact(scene, rng)
    return yes_no_prompt(fact), yes_no(fact, scene)


def write_drill(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question, with the direct answer alone; or a question of the judge's."""
    if rng.random() < YES_NO_SHARE:
        return write_yes_no(scene, rng)
    fact = random_fact(scene, rng, true_share=1.0)
    reply = rng.random() < 0.5
    if isinstance(fact, PresenceFact):
        question = f"Is there a {fact.item}?"
    elif isinstance(fact, ColourFact):
        question = f"What colour is the {fact.shape}?"
    elif isinstance(fact, CountFact):
        question = "How many shapes are there?"
    else:
        question = f"What is in the {fact.place}?"
    return question, render(fact, rng.choice, reply=reply)
