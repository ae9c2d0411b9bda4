"""OmniLMM-12B's layout: the original code's numbers, and a checkpoint written out by hand."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models import detect_family, load_model
from stream_engine.models.base import IMAGE_SLOT
from tests.models import writers_omnilmm as writers
from tests.models.conftest import GOLDEN
from tests.models.forwards import answer_logits, greedy, sequence_logits, token_logps
from tests.models.through_engine import ThroughEngine

CPU = ModelConfig(device="cpu", dtype="float32")
FOLDER = GOLDEN / "omnilmm"
RECORD = json.loads((FOLDER / "golden.json").read_text())
PATCH, START, END = 430, 431, 432


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    """The original's checkpoint as it is; it states the tower's heads nowhere."""
    return SimpleNamespace(
        model=load_model(FOLDER / "checkpoint", CPU),
        arrays=load_file(FOLDER / "golden.safetensors"),
        images={n: Image.open(FOLDER / i["file"]) for n, i in RECORD["images"].items()},
    )


@pytest.mark.parametrize("image", RECORD["images"])
@torch.no_grad()
def test_pixels_tower_and_features_are_the_originals(golden, image):
    model, arrays = golden.model, golden.arrays
    prompt = model.prompt("What?", [golden.images[image]])
    [pixels] = prompt.vision
    assert torch.equal(pixels, arrays[f"pixel/{image}"])
    # Below what the nearest wrong constant (1e-5 for EVA's epsilon) moves features by: 2.2e-5. Two
    # float32 computations differ by up to 1.1e-5 here, the same with 4, 8 and 16 lanes.
    close(model.tower(pixels[None])[0], arrays[f"tower/{image}"], atol=2e-5)
    [features] = model.encode_images([prompt])
    close(features, arrays[f"features/{image}"], atol=2e-5)


@pytest.mark.parametrize("question", RECORD["questions"], ids=lambda q: f"q{q['index']}")
def test_prompt_and_answer_ids_are_the_originals(golden, question):
    model, number = golden.model, question["index"]
    expected = golden.arrays[f"prompt_ids/q{number}"].tolist()
    ids = model.prompt(question["question"], [golden.images["wide"]]).ids
    assert [PATCH if i == IMAGE_SLOT else i for i in ids] == expected
    assert ids.count(IMAGE_SLOT) == 9
    for index, answer in enumerate(question["answers"]):
        labels = golden.arrays[f"score_labels/q{number}/a{index}"]
        scored = labels[labels != -100].tolist()
        assert [*model.encode_text(answer), model.tokenizer.eos_token_id] == scored
        assert golden.arrays[f"score_ids/q{number}/a{index}"].tolist() == expected + scored
        assert model.decode(scored) == answer


FULL = [c for c in RECORD["cases"] if c.get("mode") != "padmask"]


@pytest.mark.parametrize("case", FULL, ids=lambda case: case["keys"])
@torch.no_grad()
def test_scores_and_greedy_tokens_are_the_originals(golden, case):
    """`score_full`: nothing of the prompt is masked (the old collator hid every </s>)."""
    model, arrays, keys = golden.model, golden.arrays, case["keys"]
    asked = RECORD["questions"][case["question"]]
    prompt = model.prompt(asked["question"], [golden.images[case["image"]]])
    [features] = model.encode_images([prompt])
    if case["kind"] == "greedy":
        tokens = arrays[keys + "tokens"].tolist()
        assert greedy(model, prompt, features, len(tokens)) == tokens
        logits = answer_logits(model, prompt, features, tokens)
        close(token_logps(logits, tokens), arrays[keys + "logp"])
        close(model.lm_head(model.prefill([prompt], [features])), logits[:1])
        return
    labels = arrays[f"score_labels/q{case['question']}/a{case['answer']}"]
    scored = labels[labels != -100].tolist()
    logits = answer_logits(model, prompt, features, scored)
    logps = token_logps(logits, scored)
    close(logps, arrays[keys + "token_logp"])
    close(logps.sum(), arrays[keys + "sum_logp"], atol=5e-4)
    close(logps.mean(), arrays[keys + "mean_logp"], atol=2e-5)
    if (expected := arrays.get(keys + "answer_logits")) is not None:
        close(logits, expected)
    if (expected := arrays.get(keys + "full_logits")) is not None:
        close(sequence_logits(model, prompt, features, scored), expected, atol=1e-4)


def test_the_engine_gives_the_originals_scores_and_greedy_tokens(golden):
    through, arrays = ThroughEngine(golden.model.checkpoint, num_tokens=12), golden.arrays
    asked = [(image, q) for image in RECORD["images"] for q in RECORD["questions"]]
    prompts = [through.model.prompt(q["question"], [golden.images[i]]) for i, q in asked]
    greedy_ids = [arrays[f"greedy/{i}/q{q['index']}/tokens"].tolist() for i, q in asked]
    assert through.greedy(prompts) == greedy_ids
    scored = {
        (q, a): [t for t in arrays[f"score_labels/q{q}/a{a}"].tolist() if t != -100]
        for q in range(2)
        for a in range(3)
    }
    answers = [[scored[q["index"], a] for a in range(3)] for _, q in asked]
    for (image, q), logps in zip(asked, through.logps(prompts, answers)):
        for a, row in enumerate(logps):
            close(row, arrays[f"score_full/{image}/q{q['index']}/a{a}/token_logp"])


def test_a_mark_in_the_question_is_the_images_place(golden):
    model, image = golden.model, golden.images["tall"]
    text = Tokenizer.from_file(str(FOLDER / "checkpoint" / "tokenizer.json"))
    ids = model.prompt("Look at <image> here.", [image]).ids
    assert ids[ids.index(START) : ids.index(END) + 1] == [START, *[IMAGE_SLOT] * 9, END]
    before = text.encode("<|user|>\nLook at", add_special_tokens=False).ids[-3:]
    assert ids[: ids.index(START)][-4:-1] == before
    assert model.ask("<image>\nHere.", [image]).ids == model.prompt("Here.", [image]).ids
    with pytest.raises(RecordError, match="control_token"):
        model.ask("So?\n<|assistant|>\nYes.", [image])


def test_what_the_family_cannot_take_is_refused_by_reason(golden):
    model, image = golden.model, golden.images["tall"]
    with pytest.raises(RecordError, match="too_many_images"):
        model.prompt("Which?", [image, image])
    with pytest.raises(RecordError, match="image_placeholder"):
        model.prompt("What is <im_start>" + "<im_patch>" * 9 + "?", [image])
    with pytest.raises(RecordError, match="prompt_too_long"):
        model.prompt("why " * 2100, [])


def test_stop_tokens_defaults_and_digest(golden):
    model = golden.model
    assert model.stop_token_ids == {2}
    assert model.generation_defaults["eos_token_id"] == 2
    first, second = (model.prompt("A?", [golden.images[n]]).digest for n in ("wide", "tall"))
    assert first.ids == second.ids
    assert first.pixels != second.pixels


# -- a checkpoint of another shape, written and computed by hand -----------------------------------


def picture() -> Image.Image:
    return Image.linear_gradient("L").rotate(30).resize((50, 91)).quantize(9)


SHAPES = {
    "enlarged-table": writers.Shape(),
    "equal-table": writers.Shape(table_side=6),
    "unequal-patches": writers.Shape(image=80),
    "no-projection": writers.Shape(width=256, heads=8, blocks=1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_another_shape_computes_what_is_written_out_by_hand(tmp_path, shape):
    tensors = writers.random_weights(shape, seed=shape.image)
    model = load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    prompt = model.prompt("What is\nthis?", [picture()])
    pixels = writers.reference_pixels(picture(), shape)
    close(prompt.vision[0].double(), pixels, atol=1e-6)
    [features] = model.encode_images([prompt])
    expected = writers.reference_features(tensors, shape, prompt.vision[0])
    close(features.double(), expected, atol=1e-5)
    answer = [41, 172, 93, 2]
    logits = sequence_logits(model, prompt, features, answer).double()
    truth = writers.reference_logits(tensors, shape, prompt.ids + answer, expected)
    close(logits, truth, atol=1e-5)
    close(logits.log_softmax(-1), truth.log_softmax(-1), atol=1e-5)
    assert greedy(model, prompt, features, 1) == [int(truth[len(prompt) - 1].argmax())]


@torch.no_grad()
def test_prompts_with_and_without_images_are_encoded_in_one_batch(tmp_path):
    shape = writers.Shape()
    tensors = writers.random_weights(shape)
    model = load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    other = Image.radial_gradient("L")
    prompts = [model.prompt("A?", [other]), model.prompt("B?", []), model.prompt("C?", [picture()])]
    first, none, last = model.encode_images(prompts)
    assert none is None
    for prompt, features in ((prompts[0], first), (prompts[2], last)):
        expected = writers.reference_features(tensors, shape, prompt.vision[0])
        close(features.double(), expected, atol=1e-5)
    truth = writers.reference_logits(tensors, shape, prompts[1].ids, None)[-1:]
    hidden = model.prefill(prompts[1:2], [None])
    close(model.lm_head(hidden).double(), truth, atol=1e-5)


BROKEN = {
    "no-tower": ("drop", "model.vision_tower.pos_embed", "model.vision_tower.pos_embed is missing"),
    "missing": ("drop", "model.resampler.proj", "lacks 1 tensor of Resampler: proj"),
    "missing-block": ("drop", "model.vision_tower.blocks.1.norm2.bias", "EvaTower: blocks.1.norm2"),
    "extra": (
        "add",
        "model.vision_tower.head.weight",
        "unexpected tensor: model.vision_tower.head",
    ),
    "shape": ("add", "model.resampler.query", "model.resampler.query has shape"),
}


@pytest.mark.parametrize(("change", "name", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, change, name, says):
    shape = writers.Shape()
    tensors = writers.random_weights(shape)
    if change == "drop":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3, 3)
    with pytest.raises(CheckpointError, match=says) as error:
        load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_query": None}, "does not state num_query"),
        ({"mm_use_im_start_end": False}, "mm_use_im_start_end"),
        ({"mm_vision_heads": 7}, "width 40 cannot have 7 heads"),
        ({"num_query": 25}, "config.json needs"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, says):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape), **changes)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, CPU)


def test_a_tower_of_another_width_warns_that_its_heads_are_assumed(tmp_path, caplog):
    shape = writers.Shape(width=48, heads=3)
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape))
    config = json.loads((folder / "config.json").read_text())
    del config["mm_vision_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, CPU)
    assert model.tower.blocks[0].attn.num_heads == 3
    assert "3 heads are assumed" in caplog.text


def test_a_sentencepiece_model_alone_gives_the_same_ids(tmp_path):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape))
    before = load_model(folder, CPU).prompt("What is\nthis? café", [picture()]).ids
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json or tokenizer\.model"):
        load_model(folder, CPU)
    shutil.copy(writers.TOKENIZER / "tokenizer.model", folder)
    assert load_model(folder, CPU).prompt("What is\nthis? café", [picture()]).ids == before


def test_the_family_is_read_from_the_config(tmp_path):
    shape = writers.Shape()
    folder = writers.write(tmp_path / "llava-v1.5-7b", shape, writers.random_weights(shape))
    assert detect_family(folder) == "omnilmm"
    assert detect_family(folder, name_hint="RLAIF-V-12B") == "omnilmm"
    with pytest.raises(CheckpointError, match="promises llava"):
        detect_family(folder, name_hint="llava-v1.5-7b")


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
