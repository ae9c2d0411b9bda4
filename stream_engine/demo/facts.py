"""Facts about pictures of the demo world: how they are said, read back, and checked.

An answer is a row of clauses that end in a full stop; each clause says one fact.
`count_wrong_facts` reads an answer and counts the clauses that the scene contradicts. Knows
nothing of files or models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from stream_engine.demo.world import COLOURS, NUMBER_WORDS, PLACES, SHAPES, Item, Scene


@dataclass(frozen=True)
class PlaceFact:
    """A place holds this item, or nothing."""

    place: str
    item: Item | None

    def holds(self, scene: Scene) -> bool:
        return scene.at(self.place) == self.item

    def sentence(self) -> str:
        if self.item is None:
            return f"The {self.place} is empty."
        return f"The shape in the {self.place} is a {self.item}."

    def question(self) -> str:
        if self.item is None:
            return f"Is the {self.place} empty?"
        return f"Is the shape in the {self.place} a {self.item}?"


@dataclass(frozen=True)
class CountFact:
    """The picture has this many shapes."""

    number: int

    def holds(self, scene: Scene) -> bool:
        return len(scene.shapes()) == self.number

    def sentence(self) -> str:
        return "There " + self._rest("{verb} {number}.")

    def question(self) -> str:
        return self._rest("{verb} there {number}?").capitalize()

    def _rest(self, form: str) -> str:
        return form.format(
            verb="is" if self.number == 1 else "are",
            number=NUMBER_WORDS[self.number] + (" shape" if self.number == 1 else " shapes"),
        )


@dataclass(frozen=True)
class PresenceFact:
    """The picture has such an item somewhere, or has none."""

    item: Item
    present: bool

    def holds(self, scene: Scene) -> bool:
        return (self.item in scene.items) == self.present

    def sentence(self) -> str:
        return f"There is {'a' if self.present else 'no'} {self.item}."

    def question(self) -> str:
        return f"Is there {'a' if self.present else 'no'} {self.item}?"


@dataclass(frozen=True)
class ColourFact:
    """A shape of this kind has this colour."""

    shape: str
    colour: str

    def holds(self, scene: Scene) -> bool:
        return Item(self.colour, self.shape) in scene.items

    def sentence(self) -> str:
        return f"The {self.shape} is {self.colour}."

    def question(self) -> str:
        return f"Is the {self.shape} {self.colour}?"


Fact = PlaceFact | CountFact | PresenceFact | ColourFact

# How answers may say a fact. "{shapes}" is "one shape", "two shapes", ...
WORDINGS: dict[str, tuple[str, ...]] = {
    "place": (
        "The {place} shows a {item}.",
        "In the {place} is a {item}.",
        "In the {place} there is a {item}.",
        "The {place} has a {item}.",
    ),
    "empty": (
        "The {place} is empty.",
        "In the {place} is nothing.",
        "In the {place} there is nothing.",
        "The {place} has nothing.",
    ),
    "count": ("I can see {shapes}.", "The image shows {shapes}.", "I count {shapes}."),
    "present": ("There is a {item}.", "Yes, there is a {item}.", "I can see a {item}."),
    "absent": ("There is no {item}.", "No, there is no {item}.", "I can see no {item}."),
    "colour": ("The {shape} is {colour}.", "The colour of the {shape} is {colour}."),
}

# Short replies, which say a fact only together with the question.
REPLIES: dict[str, tuple[str, ...]] = {
    "place": ("It is a {item}.",),
    "empty": ("It is empty.",),
    "count": ("{number}.",),
    "present": ("Yes.",),
    "absent": ("No.",),
    "colour": ("It is {colour}.",),
}

_SLOTS = {
    "{place}": f"(?P<place>{'|'.join(PLACES)})",
    "{item}": f"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})",
    "{shape}": f"(?P<shape>{'|'.join(SHAPES)})",
    "{colour}": f"(?P<colour>{'|'.join(COLOURS)})",
    "{number}": f"(?P<number>{'|'.join(NUMBER_WORDS[1:])})",
    "{shapes}": "(?:(?P<one>one) shape|(?P<many>two|three|four) shapes)",
}


def _compile(template: str) -> re.Pattern[str]:
    """The pattern of a clause without its full stop."""
    pattern = re.escape(template.rstrip("."))
    for slot, slot_pattern in _SLOTS.items():
        pattern = pattern.replace(re.escape(slot), slot_pattern)
    return re.compile(pattern, re.IGNORECASE)


_CANONICAL = {
    "place": ("The shape in the {place} is a {item}.",),
    "count": ("There are {shapes}.", "There is {shapes}."),
}
_CLAUSES = [
    (kind, _compile(template))
    for table in (WORDINGS, _CANONICAL)
    for kind, templates in table.items()
    for template in templates
]
_SHORT = [(kind, _compile(template)) for kind, forms in REPLIES.items() for template in forms]
_QUESTIONS = [
    ("place", re.compile(f"What is in the {_SLOTS['{place}']}\\?")),
    ("count", re.compile(r"How many shapes are there\?")),
    ("exists", re.compile(f"Is there a {_SLOTS['{item}']}\\?")),
    ("colour", re.compile(f"What colour is the {_SLOTS['{shape}']}\\?")),
]
_REPLY_KINDS = {
    "place": ("place", "empty"),
    "count": ("count",),
    "exists": ("present", "absent"),
    "colour": ("colour",),
}


def read_question(question: str) -> tuple[str, dict[str, str]]:
    """The kind of a question ("describe" if it is none of the others) and what it is about."""
    for kind, pattern in _QUESTIONS:
        if match := pattern.fullmatch(question.strip()):
            return kind, match.groupdict()
    return "describe", {}


def render(fact: Fact, choose: Callable[[tuple[str, ...]], str], *, reply: bool = False) -> str:
    """One wording of a fact, picked by `choose`; a reply leaves out what the question says."""
    wordings = REPLIES if reply else WORDINGS
    if isinstance(fact, PlaceFact):
        kind = "empty" if fact.item is None else "place"
        return choose(wordings[kind]).format(place=fact.place, item=fact.item)
    if isinstance(fact, CountFact):
        word = NUMBER_WORDS[fact.number]
        shapes = f"{word} shape" if fact.number == 1 else f"{word} shapes"
        return choose(wordings["count"]).format(number=word.capitalize(), shapes=shapes)
    if isinstance(fact, PresenceFact):
        return choose(wordings["present" if fact.present else "absent"]).format(item=fact.item)
    return choose(wordings["colour"]).format(shape=fact.shape, colour=fact.colour)


def read_clause(clause: str, question: str) -> Fact | None:
    """The fact that a clause says in answer to a question; None if it says none."""
    clause = clause.strip().rstrip(".")
    for kind, pattern in _CLAUSES:
        if match := pattern.fullmatch(clause):
            return _fact(kind, match.groupdict())
    asked, about = read_question(question)
    for kind, pattern in _SHORT:
        if kind in _REPLY_KINDS.get(asked, ()) and (match := pattern.fullmatch(clause)):
            return _fact(kind, {**about, **match.groupdict()})
    return None


def read_facts(answer: str, question: str) -> list[Fact | None]:
    """The facts of an answer, clause by clause; None for a clause that cannot be read."""
    return [read_clause(clause, question) for clause in answer.split(".") if clause.strip()]


def count_wrong_facts(scene: Scene, question: str, answer: str) -> int:
    """How many clauses of an answer are not true of the scene.

    A clause is one fact and counts once, however much of it is wrong ("a red circle" for a blue
    square is one wrong fact). A clause that cannot be read (cut short, garbled, off the subject)
    is a wrong fact. What an answer leaves out is not wrong; an answer without any clause is one
    wrong fact.
    """
    facts = read_facts(answer, question)
    if not facts:
        return 1
    return sum(fact is None or not fact.holds(scene) for fact in facts)


def _fact(kind: str, slots: dict[str, str | None]) -> Fact:
    words = {name: value.lower() for name, value in slots.items() if value is not None}
    if kind == "place":
        return PlaceFact(words["place"], Item(words["colour"], words["shape"]))
    if kind == "empty":
        return PlaceFact(words["place"], None)
    if kind == "count":
        number = words.get("number") or words.get("one") or words["many"]
        return CountFact(NUMBER_WORDS.index(number))
    if kind == "colour":
        return ColourFact(words["shape"], words["colour"])
    return PresenceFact(Item(words["colour"], words["shape"]), present=kind == "present")
