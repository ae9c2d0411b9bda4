"""The token ids that a model was asked, and those that TRL's own collator makes of the exported
row, are the same: for every native architecture, with none, one and several pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_engine.config import ModelConfig
from stream_engine.models import load_model
from stream_engine.models.base import VisionLanguageModel
from tests.models.hf_architectures import ARCHITECTURES
from tests.models.writers_hf import write_hf
from tests.outputs.asked import QUESTIONS, ask_all, export_all
from tests.stored_pictures import STORED, seen_by_model, seen_by_trainer


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[VisionLanguageModel]:
    folder = tmp_path_factory.mktemp("hf") / request.param
    yield load_model(write_hf(folder, request.param), ModelConfig(device="cpu"))


def test_trls_collator_makes_the_prompt_that_was_asked(model: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    asked = ask_all(model)
    export_all(asked, "trl", tmp_path / "dataset")
    rows = datasets.load_dataset(str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    collate = DataCollatorForVisionPreference(model.processor)
    assert [question.name for question in asked] == list(QUESTIONS)
    for question, row in zip(asked, rows["train"], strict=True):
        pictures = list(row["images"])
        batch = collate([row])
        is_prompt = (batch["attention_mask"][0] == 1) & (batch["completion_mask"][0] == 0)
        assert batch["input_ids"][0][is_prompt].tolist() == question.ids, question.name
        for key, ours in model.ask(question.sample.question, pictures).vision.items():
            if torch.is_tensor(ours) and not key.endswith("token_type_ids"):
                assert torch.equal(ours, batch[key][: len(ours)]), (question.name, key)


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_picture_is_seen_as_the_trainer_converts_it(model: Any, kind: str) -> None:
    assert seen_by_model(model, STORED[kind]()) == seen_by_trainer(model, STORED[kind]())
