"""What is handed to vLLM is what the engine gets. vLLM itself is in no environment of the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from stream_engine.models.base import IMAGE_SLOT
from tests.benchmarks import with_vllm
from tests.benchmarks.synthetic import SHAPES, SyntheticVLM, build_llava
from tests.benchmarks.whole import end_to_end


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SyntheticVLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = build_llava(SHAPES["tiny"])
    with_vllm.write_checkpoint(hf, SHAPES["tiny"], folder)
    return folder, SyntheticVLM(hf, SHAPES["tiny"])


def test_the_checkpoint_holds_every_weight_under_the_published_names(written) -> None:
    folder, model = written
    loaded, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in model.hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(ValueError, match="no known part"):
        with_vllm.stored_name("other.weight")


def test_the_picture_it_reads_becomes_the_pixels_that_the_engine_takes(written) -> None:
    folder, model = written
    pixels = model.question(3).vision[0]
    picture = with_vllm.as_bytes(pixels).numpy()
    assert picture.dtype == np.uint8 and picture.std() > 50
    processor = CLIPImageProcessor.from_pretrained(folder)
    again = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (again - pixels).abs().max() < 1e-5


def test_one_placeholder_stands_for_the_picture(written) -> None:
    folder, model = written
    process = object.__new__(with_vllm.VllmProcess)
    process.model = model
    prompt = model.question(0)
    ids = process.ids(prompt)
    assert ids.count(model.shape.vocab - 1) == 1
    text = [i for i in prompt.ids if i != IMAGE_SLOT]
    assert [i for i in ids if i != model.shape.vocab - 1] == text
    assert ids.index(model.shape.vocab - 1) == prompt.ids.index(IMAGE_SLOT)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.shape.vocab - 1


def test_a_vllm_that_does_not_start_says_why() -> None:
    """This environment has none: the last lines of its log are the error."""
    with pytest.raises(RuntimeError, match="No module named 'vllm'"):
        end_to_end("tiny", rounds=1, vllm_python=Path(sys.executable), k=2, answer_tokens=2)


def test_a_variant_of_another_process_says_how_long_it_took() -> None:
    from tests.benchmarks import harness

    variants = {"a": lambda: {"whole": 2.0, "part": 1.0}, "b": lambda: {"whole": 4.0, "part": 3.0}}
    results = harness.compare(variants, rounds=1, subject="a", units={"b": 2})
    assert json.loads(json.dumps(results))["median_seconds"] == {"a": 2.0, "b": 2.0}
    assert set(results["parts"]) == {"part"}
