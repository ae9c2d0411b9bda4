"""The text of an answer whose ids are not known becomes ids, and the model's own end token."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.config import ModelConfig
from stream_engine.errors import RecordError
from stream_engine.models import load_model
from tests.models.conftest import FAMILIES
from tests.models.writers_hf import write_hf

CPU = ModelConfig(device="cpu")
ENDS = {
    "llava": "</s>",
    "llava_critic": "<|im_end|>",
    "minicpmv25": "<|eot_id|>",
    "minicpmv26": "<|im_end|>",
    "omnilmm": "</s>",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answers_ids_read_as_its_text_and_end_as_the_template_ends_answers(name: str) -> None:
    model = load_model(FAMILIES[name], CPU)
    assert model.decode(model.encode_answer("the red circle")) == "the red circle"
    end = model.end_token_id(model.stop_token_ids)
    assert model.tokenizer.convert_ids_to_tokens(end) == ENDS[name]
    with pytest.raises(RecordError, match="an answer holds"):
        model.encode_answer(f"the red circle{ENDS[name]}")


def test_the_end_is_the_chat_templates_where_the_tokenizers_is_another(tmp_path: Path) -> None:
    """Gemma's tokenizer ends texts with <eos>, and its template answers with <end_of_turn>."""
    model = load_model(write_hf(tmp_path / "hf", "qwen2_vl"), CPU)
    of_tokenizer, other = model.tokenizer.eos_token_id, model.tokenizer.bos_token_id
    assert model.end_token_id({of_tokenizer, other}) == of_tokenizer
    template = model.processor.chat_template  # type: ignore[attr-defined]
    model.processor.chat_template = template.replace(  # type: ignore[attr-defined]
        "<|end|>", model.tokenizer.bos_token
    )
    assert model.end_token_id({of_tokenizer, other}) == other
