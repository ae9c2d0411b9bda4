"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FAMILIES = {
    "llava": GOLDEN / "llava15" / "checkpoint",
    "llava_critic": GOLDEN / "llava_critic",
    "minicpmv25": GOLDEN / "minicpmv25",
    "minicpmv26": GOLDEN / "minicpmv26",
    "omnilmm": GOLDEN / "omnilmm" / "checkpoint",
}
"""A tiny checkpoint of each family with a front end of ours."""


@pytest.fixture
def golden_dir() -> Path:
    """What original modelling code computed from tiny checkpoints, a folder a family."""
    return GOLDEN


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads cost more than they bring, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
