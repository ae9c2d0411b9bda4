"""Questions with none, one and several pictures, asked and exported: one row each.

What a trainer's own code makes of the exported rows is compared with what the model was asked.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from stream_engine.models.base import VisionLanguageModel
from stream_engine.outputs.formats import export_class
from stream_engine.outputs.formats.base import PairRow
from stream_engine.pairs.rankings import as_asked
from stream_engine.records import (
    Answer,
    EncodedImage,
    PreferencePair,
    PromptDigest,
    Sample,
    SampleRollouts,
    sample_key,
)

QUESTIONS = {
    "one": ("What is this?", 1),
    "spaces": ("  What is\n\nthis ? ", 1),
    "none": ("Who are you, and why?", 0),
    "two": ("Which is larger?", 2),
    "inline": ("Is <image> so?", 1),
    "inline-two": ("Is <image> larger than\n<image>?", 2),
    "behind-two": ("Which is larger?\n<image>\n<image>", 2),
    "foreign": ("Das Bild zeigt \u00e4 \u4e2d\u6587 \U0001f600: <b>what</b> &amp; 'why'?", 1),
}
SIZES = ((70, 45), (30, 60))


class Asked(NamedTuple):
    """A question, the ids of its prompt, and its row in the dataset."""

    name: str
    ids: list[int]
    sample: Sample


def encoded(number: int) -> EncodedImage:
    """A picture of gradients as PNG."""
    bands = [Image.linear_gradient("L").rotate(90 * n).resize(SIZES[number]) for n in range(3)]
    buffer = io.BytesIO()
    Image.merge("RGB", bands).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue(), f"{number}.png")


def ask_all(model: VisionLanguageModel, *, max_images: int = 2) -> list[Asked]:
    """Every question that the model can take, as the pipelines ask it."""
    asked = []
    for name, (question, num_images) in QUESTIONS.items():
        if num_images > max_images:
            continue
        images = tuple(encoded(i) for i in range(num_images))
        pictures = [Image.open(io.BytesIO(image.data)) for image in images]
        key = sample_key(name, question, images)
        sample = Sample(key=key, idx=name, question=question, images=images)
        prompt = model.ask(question, pictures)
        rollouts = SampleRollouts(
            key=key,
            prompt=PromptDigest("", "", ""),
            answers=[],
            asked=model.asked(question, num_images),
        )
        asked.append(Asked(name, prompt.ids, as_asked(sample, rollouts)))
    return asked


def export_all(asked: list[Asked], format: str, folder: Path) -> None:
    """Write one pair for each question."""
    export = export_class(format)(folder, max_part_bytes=1 << 30)
    for question in asked:
        row = PairRow(question.sample, answer(0, "So."), answer(1, "Not so."), pair(question))
        assert export.write(row) is None, question.name
    export.close()
    export.describe(lambda name: name)


def answer(index: int, text: str) -> Answer:
    return Answer(index=index, text=text, token_ids=[1], token_logps=[-1.0], finish_reason="stop")


def pair(question: Asked) -> PreferencePair:
    return PreferencePair(
        key=question.sample.key, chosen=0, rejected=1, chosen_score=1.0, rejected_score=0.0
    )
