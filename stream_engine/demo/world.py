"""The small world of the embedded default: pictures of coloured shapes whose truth is known.

A picture is a 2x2 grid of places; each place is empty or holds one coloured shape. Everything is
drawn from ``(seed, number)``, which a sample's ``idx`` spells (``shapes-7-000012``), so that the
truth of a picture can be had again from a finished dataset. Knows nothing of answers
(:mod:`stream_engine.demo.facts`), files or models.
"""

from __future__ import annotations

import io
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

from stream_engine.errors import ConfigError

IMAGE_SIZE = 48  # pixels, both sides
CELL_SIZE = IMAGE_SIZE // 2
SUPERSAMPLING = 4  # shapes are drawn this much larger, then averaged down: smooth edges

PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 154, 70),
    "blue": (44, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 180),
    "black": (24, 24, 28),
}
NUMBER_WORDS = ("no", "one", "two", "three", "four")

_IDX = re.compile(r"shapes-(?P<seed>\d+)-(?P<number>\d+)")


@dataclass(frozen=True)
class Item:
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture: one entry a place, in the order of ``PLACES``; None is empty."""

    items: tuple[Item | None, Item | None, Item | None, Item | None]

    def at(self, place: str) -> Item | None:
        return self.items[PLACES.index(place)]

    def shapes(self) -> list[Item]:
        return [item for item in self.items if item is not None]


@dataclass(frozen=True)
class Picture:
    """A sample of the world: what a dataset row is made of."""

    idx: str
    scene: Scene
    question: str
    png: bytes


def random_scene(rng: random.Random) -> Scene:
    """One to four shapes, each number as likely, in random places."""
    filled = rng.sample(range(len(PLACES)), rng.randint(1, len(PLACES)))
    items = [random_item(rng) if place in filled else None for place in range(len(PLACES))]
    return Scene((items[0], items[1], items[2], items[3]))


def random_item(rng: random.Random) -> Item:
    return Item(rng.choice(tuple(COLOURS)), rng.choice(SHAPES))


def random_question(scene: Scene, rng: random.Random) -> str:
    """A question that the scene answers; "what colour is the circle" needs exactly one circle."""
    kinds = ["describe", "place", "count", "exists"]
    held = [item.shape for item in scene.shapes()]
    single = [shape for shape in SHAPES if held.count(shape) == 1]
    if single:
        kinds.append("colour")
    kind = rng.choice(kinds)
    if kind == "describe":
        return rng.choice(("Describe the image.", "What can you see in the image?"))
    if kind == "place":
        return f"What is in the {rng.choice(PLACES)}?"
    if kind == "count":
        return "How many shapes are there?"
    if kind == "colour":
        return f"What colour is the {rng.choice(single)}?"
    item = rng.choice(scene.shapes()) if rng.random() < 0.5 else random_item(rng)
    return f"Is there a {item}?"


def make_idx(seed: int, number: int) -> str:
    return f"shapes-{seed}-{number:06d}"


def make_picture(seed: int, number: int) -> Picture:
    """Picture `number` of the dataset `seed`: always the same scene, question and bytes."""
    rng = random.Random(f"{seed}:{number}")
    scene = random_scene(rng)
    question = random_question(scene, rng)
    return Picture(make_idx(seed, number), scene, question, encode_png(draw(scene, rng)))


def scene_of(idx: str) -> Scene:
    """The truth behind a sample, from its ``idx``; ConfigError if this world did not make it."""
    match = _IDX.fullmatch(idx)
    if match is None:
        raise ConfigError(f"idx {idx!r} is not of the demo world; expected shapes-SEED-NUMBER")
    return random_scene(random.Random(f"{int(match['seed'])}:{int(match['number'])}"))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture; paper, shades, sizes and positions vary a little."""
    paper = rng.randint(225, 250)
    side = IMAGE_SIZE * SUPERSAMPLING
    image = Image.new("RGB", (side, side), (paper, paper, paper + rng.randint(-6, 5)))
    pencil = ImageDraw.Draw(image)
    for place, item in enumerate(scene.items):
        if item is not None:
            _draw_item(pencil, item, row=place // 2, column=place % 2, rng=rng)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw_item(
    pencil: ImageDraw.ImageDraw, item: Item, *, row: int, column: int, rng: random.Random
) -> None:
    unit = SUPERSAMPLING
    x = ((column + 0.5) * CELL_SIZE + rng.uniform(-2, 2)) * unit
    y = ((row + 0.5) * CELL_SIZE + rng.uniform(-2, 2)) * unit
    r = rng.uniform(7, 9.5) * unit
    red, green, blue = (min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[item.colour])
    fill = (red, green, blue)
    if item.shape == "circle":
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif item.shape == "square":
        r *= 0.88
        pencil.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif item.shape == "triangle":
        pencil.polygon([(x, y - r), (x - r, y + r * 0.8), (x + r, y + r * 0.8)], fill=fill)
    else:
        arm = r * 0.32
        pencil.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pencil.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
