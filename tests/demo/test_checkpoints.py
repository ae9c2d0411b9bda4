"""The committed checkpoints: their size, their layout, and that plain transformers loads them."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from stream_engine.demo import CHECKPOINTS, checkpoint_path, demo_models
from stream_engine.demo import tiny_llava as vlm
from stream_engine.demo.world import make_picture
from stream_engine.errors import ConfigError

VISION_LANGUAGE = ("instruct", "reward", "judge", "critic")
LLAVA_TO_NATIVE = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_small(name: str) -> None:
    files = list(checkpoint_path(name).glob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in files) < 3_000_000


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_llava_layout_loads_natively_and_answers_the_same(name: str) -> None:
    """The whole model, assembled by transformers, gives the log-probs of the training code."""
    folder = checkpoint_path(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    text_config = LlamaConfig(**{k: v for k, v in config.items() if not k.startswith("mm_")})
    tower = CLIPVisionConfig.from_pretrained(folder / config["mm_vision_tower"])
    image_token = config["vocab_size"] - 1  # the original has none; any id that no text holds
    native, info = LlavaForConditionalGeneration.from_pretrained(
        folder,
        config=LlavaConfig(
            text_config=text_config,
            vision_config=tower,
            image_token_id=image_token,
            vision_feature_layer=config["mm_vision_select_layer"],
            vision_feature_select_strategy="default",
        ),
        key_mapping=LLAVA_TO_NATIVE,
        output_loading_info=True,
        dtype=torch.float32,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]

    ours = vlm.load_checkpoint(folder).eval()
    picture = make_picture(1, 0)
    pixels = vlm.to_pixels([Image.open(io.BytesIO(picture.png))])
    suffix_ids, labels = ours.batch([(picture.question, "The top left is empty.")])
    image_ids = torch.full((1, vlm.IMAGE_TOKENS), image_token)
    ids = torch.cat([ours.before_ids, image_ids, suffix_ids], dim=1)
    with torch.no_grad():
        logits = native.eval()(input_ids=ids, pixel_values=pixels).logits[:, -suffix_ids.shape[1] :]
        logps = ours(pixels, suffix_ids, labels)
    expected = torch.log_softmax(logits[:, :-1], -1).gather(-1, suffix_ids[:, 1:, None])[..., 0]
    wanted = labels[:, 1:] != vlm.IGNORE
    torch.testing.assert_close(logps[wanted], expected[wanted], atol=1e-4, rtol=1e-4)


def test_image_processor_beside_the_checkpoint_makes_the_pixels_of_training() -> None:
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint_path("instruct") / "vision_tower")
    image = Image.open(io.BytesIO(make_picture(1, 3).png))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, vlm.to_pixels([image]), atol=1e-5, rtol=0)


def test_vision_language_models_share_one_tokenizer() -> None:
    models = {(checkpoint_path(n) / "tokenizer.model").read_bytes() for n in VISION_LANGUAGE}
    assert len(models) == 1


def test_yes_and_no_are_single_tokens() -> None:
    tokenizer = vlm.load_checkpoint(checkpoint_path("judge")).tokenizer
    for word in ("yes", "Yes", "no", "No"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_text_checkpoint_loads_as_a_plain_llama() -> None:
    folder = checkpoint_path("text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == len(tokenizer)
    text = "In the top left is a red circle.\n- {Ünknown}"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("pipeline", ["dpo_reward", "divide_and_conquer", "llava_critic"])
def test_every_pipeline_has_its_models(pipeline: str) -> None:
    paths = demo_models(pipeline)
    assert Path(paths["instruct_model_path"], "config.json").is_file()
    rewards = paths["reward_model_path"].split(",")
    assert len(rewards) == (3 if pipeline == "divide_and_conquer" else 1)
    assert all(Path(path, "config.json").is_file() for path in rewards)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose from"):
        checkpoint_path("instrukt")
    with pytest.raises(ConfigError, match="choose from"):
        demo_models("dpo")
