"""`stream-engine verify-checkpoint`: does this checkpoint load, and compute what it should?

Everything is computed through the ordinary loader and engine. What can be checked without the
original code is checked always (strict load, causality, shared prefix against a plain forward, the
image's influence, the tokenizer); with a reference dump, written by `launch/dump_reference.py` in
the checkpoint's own environment, prompt ids and answer log-probs are compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.errors import CheckpointError, ConfigError, RecordError

if TYPE_CHECKING:
    from PIL.Image import Image

    from stream_engine.engine import Engine
    from stream_engine.models.base import Prompt

QUESTION = "What is in the picture? Answer in one sentence."
ANSWER = "A red circle stands on the left, and a small dog sits beside it."
TOLERANCES = {"float32": 1e-4, "float16": 0.2, "bfloat16": 1.0}
"""Largest difference of an answer's summed log-prob that rounding explains, by dtype."""
REFERENCE_TOLERANCE = 1.5
"""Against a reference dump, in nats a sum: half precision alone moves sums by up to 1.5."""


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is None for what is only shown."""

    name: str
    shown: str
    ok: bool | None = None


def verify_checkpoint(
    path: str | Path, config: ModelConfig, *, reference: str | Path | None = None
) -> Iterator[Check]:
    """Load a checkpoint and check it, line by line.

    Raises:
        CheckpointError: when it cannot be loaded at all, with the file or tensor at fault.
        ConfigError: when the reference dump cannot be read.
    """
    from stream_engine.engine import load_engine

    engine = load_engine(ModelRole("checked", str(path), "rollouts"), config, SamplingConfig())
    yield Check("strict load", "every tensor of the files was used, none is missing", True)
    for name, value in engine.describe().items():
        if name != "self_test":
            yield Check(name, json.dumps(value))
    for name, difference in engine.self_test.items():
        yield Check(f"self-test: {name}", str(difference))
    pictures = [_picture(0), _picture(1)]
    try:
        prompts = [engine.model.prompt(QUESTION, [picture]) for picture in pictures]
    except RecordError as error:
        if error.reason != "images_not_supported":
            raise CheckpointError(f"{path} cannot be asked about an image: {error}") from error
        prompts = [engine.model.prompt(QUESTION, [])]
    yield Check("prompt", json.dumps(_readable(engine, prompts[0])))
    yield _tokenizer_round_trip(engine)
    yield _prefix_against_full(engine, prompts[0])
    if len(prompts) == 2:
        yield _image_matters(engine, prompts)
    if reference is not None:
        yield from _against_reference(engine, Path(reference))


def _picture(number: int) -> Image:
    """Two pictures that nobody would confuse."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (320, 240), ["white", "navy"][number])
    box = [(40, 60, 160, 180), (180, 20, 300, 200)][number]
    ImageDraw.Draw(picture).ellipse(box, fill=["red", "yellow"][number])
    return picture


def _readable(engine: Engine, prompt: Prompt) -> str:
    """The prompt as text, each run of image positions as one mark."""
    marks = {-200, *engine.model.suppressed_token_ids}
    pieces: list[str] = []
    text: list[int] = []
    for token in [*prompt.ids, None]:
        if token is not None and token not in marks:
            text.append(token)
            continue
        if text:
            pieces.append(engine.model.tokenizer.decode(text, skip_special_tokens=False))
            text = []
        if token is not None and pieces[-1:] != ["<image>"]:
            pieces.append("<image>")
    return "".join(pieces)


def _tokenizer_round_trip(engine: Engine) -> Check:
    ids = engine.model.encode_text(ANSWER)
    text = engine.model.decode(ids)
    return Check("tokenizer round trip", f"{len(ids)} tokens -> {text!r}", text == ANSWER)


def _prefix_against_full(engine: Engine, prompt: Prompt) -> Check:
    """Scores over a cached prefix against the same answer scored token by token from scratch.

    The second way never uses a suffix of more than one token: each token is the only continuation
    of a prompt that holds all before it.
    """
    from dataclasses import replace

    answer = engine.model.encode_text(ANSWER)[:8]
    shared = sum(_score(engine, prompt, answer))
    plain = 0.0
    for place, token in enumerate(answer):
        longer = replace(prompt, ids=[*prompt.ids, *answer[:place]])
        if place and engine.model.family == "hf_vlm":
            return Check("shared prefix", f"sum {shared:.4f} (self-test only)", None)
        plain += _score(engine, longer, [token])[0]
    difference = abs(shared - plain)
    limit = TOLERANCES[str(engine.model.dtype).removeprefix("torch.")]
    shown = f"sum {shared:.5f} against {plain:.5f} by full prefills: {difference:.2g} nats apart"
    return Check("shared prefix", shown, difference <= limit)


def _image_matters(engine: Engine, prompts: Sequence[Prompt]) -> Check:
    answer = engine.model.encode_text(ANSWER)
    one, other = (sum(_score(engine, prompt, answer)) for prompt in prompts)
    shown = f"the same answer to another picture: {one:.4f} and {other:.4f}"
    return Check("image swap", shown, abs(one - other) > 1e-4)


def _score(engine: Engine, prompt: Prompt, answer: Sequence[int]) -> list[float]:
    from stream_engine.engine import RequestFailure, ScoreRequest

    result = next(iter(engine.score([ScoreRequest("checked", prompt, (tuple(answer),))])))
    if isinstance(result, RequestFailure):
        raise CheckpointError(f"scoring failed: {result.reason}: {result.detail}")
    return result.token_logps[0]


def _against_reference(engine: Engine, path: Path) -> Iterator[Check]:
    """Compare with every case of a dump; see launch/dump_reference.py for its contents."""
    import numpy as np
    from PIL import Image
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["stream_engine_reference"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a reference dump ({error}); write one with launch/dump_reference.py"
        ) from error
    yield Check("reference", json.dumps({k: v for k, v in about.items() if k != "cases"}))
    tolerance = 5e-4 if about.get("dtype") == "float32" else REFERENCE_TOLERANCE
    for number, case in enumerate(about["cases"]):
        image = Image.fromarray(np.ascontiguousarray(tensors[f"{number}/image"]))
        prompt = engine.model.prompt(case["question"], [image])
        own = _collapse(prompt.ids, engine.model.suppressed_token_ids)
        expected = tensors[f"{number}/prompt_ids"].tolist()
        place = next(
            (i for i, (a, b) in enumerate(zip(own, expected)) if a != b),
            min(len(own), len(expected)),
        )
        same = own == expected
        shown = f"{len(own)} ids" if same else f"differ at {place}: {own[place:][:5]} here"
        yield Check(f"case {number}: prompt ids", shown, same)
        answer = tensors[f"{number}/answer_ids"].tolist()
        difference = sum(_score(engine, prompt, answer)) - float(
            tensors[f"{number}/answer_logps"].sum()
        )
        shown = f"sum differs by {difference:.4g} nats over {len(answer)} tokens"
        yield Check(f"case {number}: log-probs", shown, abs(difference) <= tolerance)


def _collapse(ids: Sequence[int], image_ids: Sequence[int]) -> list[int]:
    """Ids with every run of image positions as one -200, as the dump writes them."""
    collapsed: list[int] = []
    for token in ids:
        token = -200 if token in image_ids else token
        if token != -200 or collapsed[-1:] != [-200]:
            collapsed.append(token)
    return collapsed
