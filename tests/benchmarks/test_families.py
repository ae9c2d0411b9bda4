from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import families
from tests.models import writers_llava


def tiny_llava(folder: Path) -> Path:
    weights = writers_llava.random_weights(writers_llava.Shape())
    return writers_llava.write_original(folder / "model", weights, tower="inside")


def test_a_question_passes_the_tower_once_a_model() -> None:
    """Once for sampling and once for scoring, which another model does in a run."""
    results = families.family(tiny_llava, rounds=1, tokens=2)
    assert results["tower_passes"] == 2
    assert set(results["seconds"]) == set(families.PARTS)
    assert min(results["seconds"].values()) >= 0 < results["seconds"]["tower"]
    assert sum(results["share"].values()) == pytest.approx(1, abs=0.01)
    assert results["prompt_tokens"] > writers_llava.Shape().patches
