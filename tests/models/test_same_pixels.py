"""A stored picture is seen as every trainer converts it, by each family with a front end of ours.

That a front end's pixels are its checkpoint's own processor's is tested with each family, against
what the original code made of the same pictures.
"""

from __future__ import annotations

from functools import cache

import pytest

from stream_engine.config import ModelConfig
from stream_engine.models import load_model
from stream_engine.models.base import VisionLanguageModel
from tests.models.conftest import FAMILIES
from tests.stored_pictures import STORED, seen_by_model, seen_by_trainer


@cache
def loaded(name: str) -> VisionLanguageModel:
    return load_model(FAMILIES[name], ModelConfig(device="cpu"))


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stored_picture_is_seen_as_the_trainer_converts_it(name: str, kind: str) -> None:
    assert seen_by_model(loaded(name), STORED[kind]()) == seen_by_trainer(
        loaded(name), STORED[kind]()
    )
