"""LLaVA-Critic's layout: the original code's numbers, and checkpoints written out by hand."""

from __future__ import annotations

import json
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models import detect_family, load_model
from stream_engine.models.anyres import Anyres, layout, read_pinpoints
from stream_engine.models.base import IMAGE_SLOT
from tests.models import writers_llava_onevision as writers
from tests.models.conftest import GOLDEN
from tests.models.forwards import answer_logits, greedy, sequence_logits, token_logps
from tests.models.through_engine import ThroughEngine

CPU = ModelConfig(device="cpu", dtype="float32")
FOLDER = GOLDEN / "llava_critic"
RECORD = json.loads((FOLDER / "golden.json").read_text())
IMAGES = ("square.png", "wide.png", "tall.png")
CASES = []
for case in RECORD["cases"]:
    key = case["answers"][0]["key"].removesuffix(".a0")
    CASES.append(pytest.param(key, case, id=key))


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    return SimpleNamespace(
        model=load_model(FOLDER, CPU),
        arrays=load_file(FOLDER / "golden.safetensors"),
        images={name: Image.open(FOLDER / name) for name in IMAGES},
    )


@pytest.mark.parametrize("index", range(3), ids=IMAGES)
@torch.no_grad()
def test_pixels_tower_projector_and_features_are_the_originals(golden, index):
    model, arrays = golden.model, golden.arrays
    prompt = model.prompt("What?", [golden.images[IMAGES[index]]])
    [picture] = prompt.vision
    close(picture.pixels, arrays[f"img{index}.pixel_values"], atol=1e-6)
    tower = model.tower_features(picture.pixels)
    close(tower, arrays[f"img{index}.tower_features"], atol=1e-5)
    close(model.projector(tower), arrays[f"img{index}.projector_features"], atol=1e-5)
    [features] = model.encode_images([prompt])
    close(features, arrays[f"img{index}.image_features"], atol=1e-5)


@pytest.mark.parametrize(("key", "case"), CASES)
@torch.no_grad()
def test_prompt_scores_and_greedy_tokens_are_the_originals(golden, key, case):
    model, arrays = golden.model, golden.arrays
    prompt = model.prompt(case["question"], [golden.images[case["image"]]])
    assert one_slot(prompt.ids) == arrays[f"{key}.prompt_ids"].tolist()
    assert prompt.ids.count(IMAGE_SLOT) == case["n_image_tokens"]
    [features] = model.encode_images([prompt])
    for answer in case["answers"]:
        at = answer["key"]
        ids = arrays[f"{at}.answer_ids"].tolist()
        assert [*model.encode_text(answer["text"]), 458] == ids
        assert model.decode(ids) == answer["text"]
        logits = answer_logits(model, prompt, features, ids)
        close(logits, arrays[f"{at}.logits"])
        logps = token_logps(logits, ids)
        close(logps, arrays[f"{at}.logprobs"])
        assert abs(float(logps.sum()) - answer["sum"]) <= 5e-4
        assert abs(float(logps[:-1].sum()) - answer["sum_without_end"]) <= 5e-4
    tokens = arrays[f"{key}.greedy_ids"].tolist()
    assert greedy(model, prompt, features, len(tokens)) == tokens


@pytest.mark.parametrize("index", range(len(RECORD["judge"])))
@pytest.mark.parametrize("mark", ["", "<image>\n"], ids=["bare", "marked"])
@torch.no_grad()
def test_judgements_are_the_originals(golden, index, mark):
    """The judge's instruction comes with or without its image mark."""
    model, arrays, asked = golden.model, golden.arrays, RECORD["judge"][index]
    question = asked["prompt"].split("<image>\n")[1].split("<|im_end|>")[0]
    prompt = model.ask_plainly(mark + question, [golden.images[asked["image"]]])
    assert one_slot(prompt.ids) == arrays[f"judge{index}.prompt_ids"].tolist()
    [features] = model.encode_images([prompt])
    first = model.lm_head(model.prefill([prompt], [features]))[0]
    close(first, arrays[f"judge{index}.first_logits"])
    tokens = arrays[f"judge{index}.greedy_ids"].tolist()
    assert greedy(model, prompt, features, len(tokens)) == tokens


def test_the_engine_gives_the_originals_scores_and_greedy_tokens(golden):
    cases = [case.values for case in CASES]
    through = ThroughEngine(FOLDER, num_tokens=12)
    prompts = [through.model.prompt(c["question"], [golden.images[c["image"]]]) for _, c in cases]
    greedy_ids = [golden.arrays[f"{key}.greedy_ids"].tolist() for key, _ in cases]
    assert through.greedy(prompts) == greedy_ids
    answers = [[answer["key"] for answer in case["answers"]] for _, case in cases]
    ids = [[golden.arrays[f"{at}.answer_ids"].tolist() for at in of_case] for of_case in answers]
    for of_case, logps in zip(answers, through.logps(prompts, ids)):
        for at, row in zip(of_case, logps):
            close(row, golden.arrays[f"{at}.logprobs"])


def test_stop_tokens_and_defaults_are_the_checkpoints(golden):
    assert golden.model.stop_token_ids == {456, 458}  # generation_config.json
    assert golden.model.generation_defaults["repetition_penalty"] == 1.05
    assert golden.model.vocab_size == 476


# -- checkpoints of another shape, written and computed by hand ------------------------------------


def picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(35).resize((width, height))


def template(content: str) -> str:
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )


def reference_ids(content: str, features: list[torch.Tensor]) -> list[int]:
    tokenizer = Tokenizer.from_file(str(writers.TOKENIZER / "tokenizer.json"))
    rows = iter(features)
    ids = []
    for number, chunk in enumerate(template(content).split("<image>")):
        ids += [IMAGE_SLOT] * len(next(rows)) if number else []
        ids += tokenizer.encode(chunk, add_special_tokens=False).ids
    return ids


SHAPES = {
    "anyres_max": writers.Shape(),
    "anyres": writers.Shape(aspect="anyres", projector_layers=1),
    "max_1": writers.Shape(aspect="anyres_max_1", projector_layers=3),
}
SIZES = {"one-crop": (40, 40), "wide": (140, 39), "tall": (50, 187), "large": (300, 310)}
SIZES["a-little-over"] = (48, 160)  # 30 features for a budget of 27: not shrunk


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_another_shape_computes_what_is_written_out_by_hand(tmp_path, shape, size):
    tensors = writers.random_weights(shape, seed=size[0])
    model = load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    prompt = model.prompt("What is\nthis?", [picture(*size)])
    views = writers.reference_views(picture(*size), shape)
    close(prompt.vision[0].pixels.double(), torch.stack(views), atol=1e-6)
    expected = writers.reference_features(tensors, shape, size, views)
    assert prompt.ids == reference_ids("<image>\nWhat is\nthis?", [expected])
    [features] = model.encode_images([prompt])
    close(features.double(), expected, atol=1e-5)

    answer = [41, 172, 93]
    logits = sequence_logits(model, prompt, features, answer).double()
    truth = writers.reference_logits(tensors, shape, prompt.ids + answer, expected)
    close(logits, truth, atol=1e-5)
    close(logits.log_softmax(-1), truth.log_softmax(-1), atol=1e-5)
    assert greedy(model, prompt, features, 1) == [int(truth[len(prompt) - 1].argmax())]


@torch.no_grad()
def test_several_images_are_padded_and_seen_once_each(tmp_path):
    shape, sizes = writers.Shape(), [(90, 40), (33, 77)]
    tensors = writers.random_weights(shape)
    model = load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    images = [picture(*size) for size in sizes]
    views = [writers.reference_views(image, shape, squared=True) for image in images]
    features = [writers.reference_features(tensors, shape, s, v) for s, v in zip(sizes, views)]
    prompt = model.prompt("Which is larger?", images)
    assert prompt.ids == reference_ids("<image> <image>\nWhich is larger?", features)
    close(model.encode_images([prompt])[0].double(), torch.cat(features), atol=1e-5)
    placed = model.ask("Is <image> larger than <image>?", images)
    assert placed.ids == reference_ids("Is <image> larger than <image>?", features)
    assert model.asked("Is <image> large?", 1) == "Is  large?"


@torch.no_grad()
def test_a_checkpoint_trained_with_padding_sees_one_square(tmp_path):
    shape = writers.Shape(aspect="pad")
    tensors = writers.random_weights(shape)
    folder = writers.write(tmp_path / "m", shape, tensors, image_grid_pinpoints=None)
    model = load_model(folder, CPU)
    prompt = model.prompt("What?", [picture(90, 40)])
    views = writers.reference_views(picture(90, 40), shape, squared=True)
    expected = writers.reference_features(tensors, shape, (90, 40), views)
    close(model.encode_images([prompt])[0].double(), expected, atol=1e-5)


@torch.no_grad()
def test_companions_in_a_batch_of_prompts_change_nothing(tmp_path):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape))
    model = load_model(folder, CPU)
    pictures = [[picture(300, 310)], [], [picture(40, 90), picture(9, 9)], [picture(140, 39)] * 1]
    pictures += [[picture(250 + n, 260)] for n in range(3)]  # more crops than one batch takes
    prompts = [model.prompt("What?", images) for images in pictures]
    together = model.encode_images(prompts)
    assert together[1] is None
    for prompt, features in zip(prompts, together):
        if prompt.vision:
            close(features, model.encode_images([prompt])[0], atol=5e-6)


@pytest.mark.parametrize("size", [(3, 400), (400, 3), (1, 1), (96, 96), (97, 95), (1000, 700)])
def test_extreme_pictures_take_as_many_positions_as_they_have_features(tmp_path, size):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape))
    model = load_model(folder, CPU)
    prompt = model.prompt("What?", [picture(*size)])
    with torch.no_grad():
        [features] = model.encode_images([prompt])
    assert prompt.ids.count(IMAGE_SLOT) == len(features)
    assert len(prompt.vision[0].pixels) == 1 + len(
        writers.reference_views(picture(*size), shape)[1:]
    )


def test_any_picture_is_laid_out_as_by_hand():
    shape = writers.Shape()
    anyres = Anyres(crop=48, grid=3, pinpoints=shape.pinpoints, max_crops=3)
    random = Random(0)
    for _ in range(300):
        size = (random.randint(1, 400), random.randint(1, 400))
        place = layout(size, anyres)
        assert (place.columns, place.rows) == writers.reference_grid(size, shape), size
        assert (place.left, place.top) == writers.reference_margins(size, shape), size


def test_pinpoints_may_be_a_text_or_a_range():
    sizes = read_pinpoints([[48, 48], [48, 96], [96, 48], [96, 96]], 48)
    assert read_pinpoints("[(48, 48), (48, 96), (96, 48), (96, 96)]", 48) == sizes
    assert read_pinpoints("(1x1),...,(2x2)", 48) == sizes
    with pytest.raises(ValueError, match="not a list"):
        read_pinpoints(None, 48)


def test_a_question_that_is_too_long_is_refused_by_reason(tmp_path):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape))
    with pytest.raises(RecordError, match=r"prompt_too_long: \d+ tokens of 900"):
        load_model(folder, CPU).prompt("why " * 1000, [])


BROKEN = {
    "missing": ("drop", "model.mm_projector.2.bias", "Projector: 2.bias"),
    "newline": ("drop", "model.image_newline", "Projector: newline"),
    "no-tower": (
        "drop",
        f"{writers.TOWER}embeddings.position_embedding.weight",
        "holds no vision tower",
    ),
    "extra": ("add", "model.mm_projector.4.bias", "unexpected tensor: model.mm_projector.4.bias"),
    "shape": ("add", "model.mm_projector.0.bias", "model.mm_projector.0.bias has shape"),
}


@pytest.mark.parametrize(("change", "name", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, change, name, says):
    shape = writers.Shape()
    tensors = writers.random_weights(shape)
    if change == "drop":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3)
    with pytest.raises(CheckpointError, match=says) as error:
        load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres'"),
        ({"mm_projector_type": "pooler"}, "mm_projector_type 'pooler'"),
        ({"image_grid_pinpoints": None}, "cannot read image_grid_pinpoints"),
        ({"tower_config": ""}, "--vision_tower_path"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, says):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape), **changes)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, CPU)


def test_the_towers_config_may_be_named_or_told(tmp_path):
    shape = writers.Shape()
    tensors = writers.random_weights(shape)
    named = "google/siglip-so400m-patch14-384"
    first = load_model(writers.write(tmp_path / "a", shape, tensors, tower_config=named), CPU)
    bare = writers.write(tmp_path / "b", shape, tensors, tower_config="")
    told = ModelConfig(device="cpu", vision_tower_path=str(tmp_path / "a" / named))
    second = load_model(bare, told)
    assert first.tower is second.tower
    assert len(first.tower.encoder.layers) == shape.tower.layers


def test_the_family_is_read_from_the_config(tmp_path):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape))
    assert detect_family(folder) == "llava_onevision"
    assert detect_family(folder, name_hint="llava-critic-7b") == "llava_onevision"
    with pytest.raises(CheckpointError, match="promises minicpm_v"):
        detect_family(folder, name_hint="MiniCPM-V-2_6")


def one_slot(ids: list[int]) -> list[int]:
    """The original keeps one sentinel an image until it inserts the features."""
    return [t for i, t in enumerate(ids) if t != IMAGE_SLOT or ids[i - 1] != IMAGE_SLOT]


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
