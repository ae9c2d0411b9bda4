"""What the judge and the critic are trained to say, taken from the truth of a scene."""

from __future__ import annotations

from stream_engine.demo.facts import (
    ColourFact,
    CountFact,
    Fact,
    PlaceFact,
    PresenceFact,
    read_facts,
)
from stream_engine.demo.world import Scene
from tests.demo_training.prompts import YES_NO_PROMPT

AMOUNTS = ("none", "one", "two", "three", "four")


def yes_no_prompt(fact: Fact) -> str:
    return YES_NO_PROMPT.format(fact.question())


def yes_no(fact: Fact, scene: Scene) -> str:
    return "Yes" if fact.holds(scene) else "No"


def critic_reasoning(scene: Scene, question: str, first: str, second: str) -> str:
    """A verdict on two answers, after a mark on each of their clauses, called by its subject.

    ``First: count yes, top left no, top right yes, bottom left yes, so one wrong. Second: ...``
    ``The second response is better.``
    """
    lines, wrong = [], []
    for name, answer in (("First", first), ("Second", second)):
        facts = read_facts(answer, question)
        marks = [fact is not None and fact.holds(scene) for fact in facts]
        said = [f"{_subject(f)} {'yes' if m else 'no'}" for f, m in zip(facts, marks, strict=True)]
        wrong.append(len(marks) - sum(marks))
        lines.append(f"{name}: {', '.join(said)}, so {AMOUNTS[wrong[-1]]} wrong.")
    return " ".join([*lines, verdict(*wrong)])


def verdict(first_wrong: int, second_wrong: int) -> str:
    """The sentence that the pipelines read, for two answers with so many wrong facts."""
    if first_wrong == second_wrong:
        return "Two responses are equally good."
    return f"The {'first' if first_wrong < second_wrong else 'second'} response is better."


def _subject(fact: Fact | None) -> str:
    """What a clause is about, in words that are one token each."""
    if isinstance(fact, PlaceFact):
        return fact.place
    names = {CountFact: "count", ColourFact: "colour", PresenceFact: "there", type(None): "nothing"}
    return names[type(fact)]
