"""Each family's tiny model on a GPU, vision tower included, against the same on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from stream_engine.demo import checkpoint_path
from tests.gpu.device import DEVICE, ON_GPU, needs_device, torch_forms
from tests.models.conftest import FAMILIES
from tests.models.hf_architectures import ARCHITECTURES
from tests.models.through_engine import ThroughEngine
from tests.models.writers_hf import write_hf

pytestmark = needs_device

OWN = FAMILIES | {"text": checkpoint_path("text")}
SHARED = [name for name, architecture in ARCHITECTURES.items() if architecture.shares_prefix]
TOKENS = 12 if ON_GPU else 2
# The features of a tower and the states of the language model: float32 on both, summed in
# another order. Tiny models with large random weights make little of that, a wrong kernel much.
TOLERANCE = 2e-3


def checkpoint(name: str, folder: Path) -> Path:
    return OWN[name] if name in OWN else write_hf(folder / name, name)


@pytest.mark.parametrize("name", [*OWN, *SHARED])
@torch.no_grad()
def test_features_answers_and_scores_are_the_cpus(name, tmp_path):
    path = checkpoint(name, tmp_path)
    gpu = ThroughEngine(path, TOKENS, device=DEVICE)
    with torch_forms():
        cpu = ThroughEngine(path, TOKENS)
        pictures = [] if name == "text" else [Image.radial_gradient("L").resize((70, 50))]
        pictures = [picture.convert("RGB") for picture in pictures]
        questions = ["What is this?", "Is there a red square to the left?"]
        prompts = [cpu.model.prompt(question, pictures) for question in questions]
        expected_features = cpu.model.encode_images(prompts)
        answers = cpu.greedy(prompts)
        expected = cpu.logps(prompts, [[answer, answer[:1]] for answer in answers])
    own_prompts = [gpu.model.prompt(question, pictures) for question in questions]
    for own, other in zip(gpu.model.encode_images(own_prompts), expected_features, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            assert (own.cpu() - other).abs().max() <= TOLERANCE * other.abs().max()
    assert gpu.greedy(own_prompts) == answers
    scored = gpu.logps(own_prompts, [[answer, answer[:1]] for answer in answers])
    for of_prompt, others in zip(scored, expected, strict=True):
        for own, other in zip(of_prompt, others, strict=True):
            assert (own - other).abs().max() <= TOLERANCE
