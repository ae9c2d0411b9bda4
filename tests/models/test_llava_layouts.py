"""Every layout of LLaVA-1.5, written by code that shares nothing with the loader."""

from __future__ import annotations

import math

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models import detect_family, load_model
from tests.models import writers_llava as writers
from tests.models.forwards import greedy, sequence_logits

CPU = ModelConfig(device="cpu", dtype="float32")
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
LONG = writers.Shape(heads=3, kv_heads=3, layers=3, rope_theta=50000.0, projector_layers=3)
LINEAR = writers.Shape(projector_layers=1, select_layer=-1, image=28)
TIED = writers.Shape(tied=True)
LAYOUTS = {
    "beside": lambda f, w: writers.write_original(f, w),
    "beside-bin": lambda f, w: writers.write_original(f, w, kind="bin", shards=3),
    "inside": lambda f, w: writers.write_original(f, w, tower="inside", shards=1),
    "inside-bin-float32": lambda f, w: writers.write_original(
        f, w, tower="inside", kind="bin", shards=1, dtype=torch.float32
    ),
    "hf": lambda f, w: writers.write_hf(f, w),
    "hf-bin": lambda f, w: writers.write_hf(f, w, kind="bin", shards=1),
    "hf-flat": lambda f, w: writers.write_hf(f, w, names="flat", shards=1),
}
SHAPES = {"gqa": writers.Shape(), "long": LONG, "linear": LINEAR, "tied": TIED}
CASES = [(layout, "gqa") for layout in LAYOUTS]
CASES += [("beside", "long"), ("beside", "linear"), ("inside", "tied"), ("hf", "tied")]


def pictures() -> list[Image.Image]:
    """A wide gradient, a tall palette picture, a grey one with alpha."""
    wide = Image.linear_gradient("L").resize((90, 40)).convert("RGB")
    tall = Image.radial_gradient("L").resize((30, 75)).convert("RGB").quantize(16)
    return [wide, tall, Image.linear_gradient("L").convert("LA")]


@pytest.mark.parametrize(("layout", "shape"), CASES)
@torch.no_grad()
def test_every_layout_computes_what_is_written_out_by_hand(tmp_path, layout, shape):
    weights = writers.random_weights(SHAPES[shape], seed=len(layout))
    model = load_model(LAYOUTS[layout](tmp_path / "model", weights), CPU)
    assert model.vocab_size == 480
    question = "What is\nin the picture?"
    prompt = model.prompt(question, pictures()[:2])
    assert prompt.ids == reference_ids(question, 2, weights.shape.patches)

    expected_pixels = [reference_pixels(p, weights.shape) for p in pictures()[:2]]
    for pixels, expected in zip(prompt.vision, expected_pixels, strict=True):
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    expected = torch.cat([writers.reference_features(weights, p) for p in prompt.vision])
    [features] = model.encode_images([prompt])
    torch.testing.assert_close(features.double(), expected, atol=1e-5, rtol=0)

    answer = [50, 61, 72, 83]
    logits = sequence_logits(model, prompt, features, answer)
    truth = writers.reference_logits(weights, prompt.ids + answer, expected)
    torch.testing.assert_close(logits.double(), truth, atol=1e-5, rtol=0)
    logps = logits.log_softmax(-1).double()
    torch.testing.assert_close(logps, truth.log_softmax(-1), atol=1e-5, rtol=0)
    first = greedy(model, prompt, features, 1)
    assert first == [int(truth[len(prompt) - 1].argmax())]


@torch.no_grad()
def test_prefill_ends_where_the_answer_begins(tmp_path):
    weights = writers.random_weights(writers.Shape())
    model = load_model(writers.write_original(tmp_path / "m", weights), CPU)
    prompts = [model.prompt("What?", pictures()[2:]), model.prompt("Why?", [])]
    features = model.encode_images(prompts)
    hidden = model.prefill(prompts[:1], features[:1])
    expected = writers.reference_features(weights, prompts[0].vision[0])
    truth = writers.reference_logits(weights, prompts[0].ids, expected)[-1]
    torch.testing.assert_close(model.lm_head(hidden)[0].double(), truth, atol=1e-5, rtol=0)
    assert features[1] is None
    alone = model.prefill(prompts[1:], features[1:])
    truth = writers.reference_logits(weights, prompts[1].ids, None)[-1]
    torch.testing.assert_close(model.lm_head(alone)[0].double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("write", [writers.write_original, writers.write_hf])
def test_layers_after_the_selected_one_are_not_built(tmp_path, write):
    model = load_model(write(tmp_path / "m", writers.random_weights(writers.Shape())), CPU)
    assert len(model.tower.encoder.layers) == 2


def test_rows_added_by_the_converter_stay_out_of_the_digest_and_the_softmax(tmp_path):
    weights = writers.random_weights(writers.Shape())
    original = load_model(writers.write_original(tmp_path / "a", weights), CPU)
    hf = load_model(writers.write_hf(tmp_path / "b", weights), CPU)
    digests = [model.prompt("What?", pictures()).digest for model in (original, hf)]
    assert digests[0] == digests[1]
    assert hf.lm_head.weight.shape[0] == 485
    assert hf.vocab_size == original.vocab_size == 480


def test_equal_towers_are_loaded_once_and_different_ones_are_not(tmp_path):
    weights = writers.random_weights(writers.Shape())
    first = load_model(writers.write_original(tmp_path / "a", weights), CPU)
    second = load_model(writers.write_original(tmp_path / "b", weights, tower="inside"), CPU)
    assert first.tower is second.tower
    weights.vision["encoder.layers.0.mlp.fc1.bias"][3] += 0.5
    third = load_model(writers.write_hf(tmp_path / "c", weights), CPU)
    assert third.tower is not first.tower


def test_without_padding_the_picture_is_cropped(tmp_path):
    """91 x 40 pixels become 95.55 x 42, which is cut to 95."""
    weights = writers.random_weights(writers.Shape())
    folder = writers.write_original(tmp_path / "m", weights, image_aspect_ratio=None)
    model = load_model(folder, CPU)
    for size in ((91, 40), (40, 91)):
        picture = pictures()[0].resize(size)
        expected = reference_pixels(picture, weights.shape, pad=False)
        [pixels] = model.prompt("What?", [picture]).vision
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_vision_tower_path_is_used_where_the_checkpoint_has_no_tower(tmp_path):
    weights = writers.random_weights(writers.Shape())
    folder = writers.write_original(tmp_path / "m", weights, tower="absent")
    with pytest.raises(CheckpointError, match="--vision_tower_path"):
        load_model(folder, CPU)
    clip = writers.write_clip(tmp_path / "clip", weights)
    config = ModelConfig(device="cpu", vision_tower_path=str(clip))
    model = load_model(folder, config)
    prompt = model.prompt("What?", pictures()[:1])
    with torch.no_grad():
        [features] = model.encode_images([prompt])
    expected = writers.reference_features(weights, prompt.vision[0])
    torch.testing.assert_close(features.double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"nowhere has no config\.json"):
        load_model(folder, ModelConfig(device="cpu", vision_tower_path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_layer": -9}, "layer -9"),
    ],
)
def test_what_is_not_llava_15_is_refused_by_name(tmp_path, config, says):
    weights = writers.random_weights(writers.Shape())
    folder = writers.write_original(tmp_path / "m", weights, **config)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, CPU)


def test_the_family_is_read_from_the_config_and_a_contradicting_name_is_an_error(tmp_path):
    weights = writers.random_weights(writers.Shape())
    folder = writers.write_hf(tmp_path / "omnilmm-12b", weights)
    assert detect_family(folder) == "llava"
    assert detect_family(folder, name_hint="llava-v1.5-7b") == "llava"


def reference_ids(question: str, images: int, patches: int) -> list[int]:
    """sentencepiece itself, chunk by chunk, one BOS, -200 for each image position."""
    processor = sentencepiece.SentencePieceProcessor(str(writers.TOKENIZER / "tokenizer.model"))
    text = f"{SYSTEM} USER: " + "<image>\n" * images + f"{question} ASSISTANT:"
    ids = [1]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [-200] * patches * min(number, 1) + processor.encode(chunk)
    return ids


def reference_pixels(image: Image.Image, shape: writers.Shape, *, pad: bool = True) -> torch.Tensor:
    """transformers' own processor, after padding by hand."""
    image = image.convert("RGB")
    if pad:
        side = max(image.size)
        colour = tuple(math.floor(mean * 255) for mean in writers.CLIP_MEAN)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image},
        crop_size={"height": shape.image, "width": shape.image},
        resample=3,
        image_mean=writers.CLIP_MEAN,
        image_std=writers.CLIP_STD,
    )
    return processor(image, return_tensors="pt")["pixel_values"][0]
