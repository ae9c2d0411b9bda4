"""Written answers for training: true ones, and ones that hallucinate on purpose.

Every answer says four facts in wordings picked at random, so that two answers to one question are
rarely the same text and hardly differ in length. Knows nothing of models.
"""

from __future__ import annotations

import random

from stream_engine.demo.facts import (
    ColourFact,
    CountFact,
    Fact,
    PlaceFact,
    PresenceFact,
    read_question,
    render,
)
from stream_engine.demo.world import COLOURS, PLACES, SHAPES, Item, Scene, random_item

FACTS_PER_ANSWER = 4
REPLY_SHARE = 0.4  # of the direct answers, those that lean on the question ("It is red.")


def true_facts(scene: Scene, question: str, rng: random.Random) -> list[Fact]:
    """What a truthful answer says: the direct answer first, then remarks on other places."""
    kind, about = read_question(question)
    if kind == "describe":
        return [PlaceFact(place, scene.at(place)) for place in PLACES]
    direct: Fact
    if kind == "place":
        direct = PlaceFact(about["place"], scene.at(about["place"]))
    elif kind == "count":
        direct = CountFact(len(scene.shapes()))
    elif kind == "exists":
        item = Item(about["colour"], about["shape"])
        direct = PresenceFact(item, item in scene.items)
    else:
        colours = [item.colour for item in scene.shapes() if item.shape == about["shape"]]
        direct = ColourFact(about["shape"], colours[0])
    others = [place for place in PLACES if place != about.get("place")]
    remarks = sorted(rng.sample(others, FACTS_PER_ANSWER - 1), key=PLACES.index)
    return [direct, *(PlaceFact(place, scene.at(place)) for place in remarks)]


def corrupt(fact: Fact, rng: random.Random) -> Fact:
    """The same fact made wrong in one respect."""
    if isinstance(fact, PlaceFact):
        if fact.item is None:
            return PlaceFact(fact.place, random_item(rng))
        if rng.random() < 0.15:
            return PlaceFact(fact.place, None)
        return PlaceFact(fact.place, _other_item(fact.item, rng))
    if isinstance(fact, CountFact):
        return CountFact(rng.choice([n for n in (1, 2, 3, 4) if abs(n - fact.number) == 1]))
    if isinstance(fact, PresenceFact):
        return PresenceFact(fact.item, not fact.present)
    return ColourFact(fact.shape, rng.choice([c for c in COLOURS if c != fact.colour]))


def write_answer(
    scene: Scene, question: str, rng: random.Random, *, error_rate: float = 0.0
) -> str:
    """An answer in which each fact is wrong with probability `error_rate`.

    Facts with a single wrong form (a count, yes or no) are wrong less often: a model sampled at a
    low temperature sharpens them more, and truth should stay the likelier answer.
    """
    facts = []
    for fact in true_facts(scene, question, rng):
        rate = error_rate * (0.75 if isinstance(fact, CountFact | PresenceFact) else 1.0)
        facts.append(corrupt(fact, rng) if rng.random() < rate else fact)
    asked = read_question(question)[0] != "describe"
    return " ".join(
        render(fact, rng.choice, reply=asked and position == 0 and rng.random() < REPLY_SHARE)
        for position, fact in enumerate(facts)
    )


def _other_item(item: Item, rng: random.Random) -> Item:
    if rng.random() < 0.6:
        return Item(rng.choice([c for c in COLOURS if c != item.colour]), item.shape)
    return Item(item.colour, rng.choice([s for s in SHAPES if s != item.shape]))
