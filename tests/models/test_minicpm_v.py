"""MiniCPM-V 2.5 and 2.6: the original code's numbers, and checkpoints written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
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
from stream_engine.models.minicpm_v import bucket_positions, image_block
from stream_engine.models.slices import slice_image
from tests.models import writers_minicpm_v as writers
from tests.models.conftest import GOLDEN
from tests.models.forwards import answer_logits, greedy, sequence_logits, token_logps
from tests.models.through_engine import ThroughEngine

CPU = ModelConfig(device="cpu", dtype="float32")
VERSIONS = ("minicpmv25", "minicpmv26")
IMAGES = ("square.png", "wide.png", "tall.png")
UNK = {"minicpmv25": 458, "minicpmv26": 475}
CASES = []
for family in VERSIONS:
    seen: dict[str, int] = {}
    for case in json.loads((GOLDEN / family / "golden.json").read_text())["cases"]:
        question = seen[case["image"]] = seen.get(case["image"], -1) + 1
        key = f"img{IMAGES.index(case['image'])}.q{question}"
        CASES.append(pytest.param(family, key, case, id=f"{family}.{key}"))


@pytest.fixture(scope="module")
def golden() -> dict[str, SimpleNamespace]:
    return {
        family: SimpleNamespace(
            model=load_model(GOLDEN / family, CPU),
            arrays=load_file(GOLDEN / family / "golden.safetensors"),
            record=json.loads((GOLDEN / family / "golden.json").read_text()),
            images=[Image.open(GOLDEN / family / name) for name in IMAGES],
        )
        for family in VERSIONS
    }


@pytest.mark.parametrize("family", VERSIONS)
@pytest.mark.parametrize("index", range(3), ids=IMAGES)
@torch.no_grad()
def test_slices_tower_and_features_are_the_originals(golden, family, index):
    it = golden[family]
    prompt = it.model.prompt("What?", [it.images[index]])
    sizes = it.arrays[f"img{index}.tgt_sizes"].tolist()
    assert [[piece.rows, piece.columns] for piece in prompt.vision] == sizes
    for number, piece in enumerate(prompt.vision):
        close(piece.pixels, it.arrays[f"img{index}.slice{number}"], atol=1e-6)
    tower = it.model.tower_features(prompt.vision)
    expected = it.arrays[f"img{index}.vpm_features"]
    for number, piece in enumerate(prompt.vision):  # 2.5's padding has meaning, 2.6's has not
        rows = None if family == "minicpmv25" else piece.num_patches
        close(tower[number, :rows], expected[number, :rows], atol=1e-5)
    [features] = it.model.encode_images([prompt])
    close(features, it.arrays[f"img{index}.image_features"].flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize(("family", "key", "case"), CASES)
@torch.no_grad()
def test_prompt_scores_and_greedy_tokens_are_the_originals(golden, family, key, case):
    it = golden[family]
    model, arrays = it.model, it.arrays
    prompt = model.prompt(case["question"], [it.images[IMAGES.index(case["image"])]])
    assert unfilled(prompt.ids, family) == arrays[f"{key}.prompt_ids"].tolist()
    bounds = arrays[f"{key}.image_bound"].tolist()
    slots = [position for start, end in bounds for position in range(start, end)]
    assert [i for i, token in enumerate(prompt.ids) if token == IMAGE_SLOT] == slots
    [features] = model.encode_images([prompt])
    for number, answer in enumerate(case["answers"]):
        at = f"{key}.a{number}"
        ids = arrays[f"{at}.answer_ids"].tolist()
        end = model.tokenizer.convert_tokens_to_ids(it.record["end_token"])
        assert [*model.encode_text(answer["text"]), end] == ids
        assert model.decode(ids) == answer["text"]
        logits = answer_logits(model, prompt, features, ids)
        close(logits, arrays[f"{at}.logits"])
        logps = token_logps(logits, ids)
        close(logps, arrays[f"{at}.logprobs"])
        assert abs(float(logps.sum()) - answer["sum"]) <= 5e-4
        assert abs(float(logps[:-1].sum()) - answer["sum_without_end"]) <= 5e-4
    tokens = arrays[f"{key}.greedy_ids"].tolist()
    assert greedy(model, prompt, features, len(tokens)) == tokens
    first = model.lm_head(model.prefill([prompt], [features]))
    close(first, answer_logits(model, prompt, features, tokens)[:1])


@pytest.mark.parametrize("family", VERSIONS)
def test_the_engine_gives_the_originals_scores_and_greedy_tokens(golden, family):
    it, cases = golden[family], [case.values for case in CASES if case.values[0] == family]
    through = ThroughEngine(GOLDEN / family, num_tokens=12)
    prompts = [
        through.model.prompt(case["question"], [it.images[IMAGES.index(case["image"])]])
        for _, _, case in cases
    ]
    greedy_ids = [it.arrays[f"{key}.greedy_ids"].tolist() for _, key, _ in cases]
    assert through.greedy(prompts) == greedy_ids
    answers = [[f"{key}.a{n}" for n in range(3)] for _, key, _ in cases]
    ids = [[it.arrays[f"{at}.answer_ids"].tolist() for at in of_case] for of_case in answers]
    for of_case, logps in zip(answers, through.logps(prompts, ids)):
        for at, row in zip(of_case, logps):
            close(row, it.arrays[f"{at}.logprobs"])


@pytest.mark.parametrize("family", VERSIONS)
@torch.no_grad()
def test_no_exclamation_mark_is_masked_or_lost(golden, family):
    """2.6's own chat hides every "!", whose id is 0; `greedy_ids_unmasked` is without that."""
    it = golden[family]
    asked = it.record["bang"]
    prompt = it.model.prompt(asked["question"], [it.images[IMAGES.index(asked["image"])]])
    assert unfilled(prompt.ids, family) == it.arrays["bang.prompt_ids"].tolist()
    assert 0 in prompt.ids
    [features] = it.model.encode_images([prompt])
    tokens = it.arrays["bang.greedy_ids_unmasked"].tolist()
    assert greedy(it.model, prompt, features, len(tokens)) == tokens
    assert it.model.decode(it.model.encode_text("Tell me! Now!")) == "Tell me! Now!"


@pytest.mark.parametrize("limit", ["max2.idNone", "max1.idNone", "max9.idFalse", "nonewline"])
@pytest.mark.parametrize("index", range(3), ids=IMAGES)
def test_other_slice_limits_and_image_numbers_are_the_originals(golden, tmp_path, limit, index):
    """The arrays `pre.*`: only the processor ran, on the user's turn without a template."""
    it = golden["minicpmv26"]
    front = it.model.front
    if limit.startswith("max"):
        slicing = replace(front.slicing, max_slices=int(limit[3]))
        front = replace(front, slicing=slicing, numbers_images="False" not in limit)
    pieces, grid = slice_image(it.images[index], front.slicing)
    between = "" if limit == "nonewline" else "\n"
    question = next(c["question"] for c in it.record["cases"])
    ids = it.model.encode_text(image_block(front, 0, grid) + between + question)
    assert ids == it.arrays[f"pre.img{index}.{limit}.ids"].tolist()
    if (sizes := it.arrays.get(f"pre.img{index}.{limit}.tgt_sizes")) is not None:
        assert [[piece.rows, piece.columns] for piece in pieces] == sizes.tolist()


@torch.no_grad()
def test_slices_of_25_see_their_companions_and_those_of_26_do_not(golden):
    for family, depends in (("minicpmv25", True), ("minicpmv26", False)):
        model = golden[family].model
        slices = model.prompt("What?", [golden[family].images[0]]).vision
        together = model.encode_slices(slices)[:1]
        alone = model.encode_slices(slices[:1])
        assert (float((together - alone).abs().max()) > 0.1) == depends


@pytest.mark.parametrize("family", VERSIONS)
@torch.no_grad()
def test_companions_in_a_batch_of_prompts_change_nothing(golden, family):
    it = golden[family]
    pictures = [[it.images[0]], [], [it.images[1], it.images[2]], [it.images[2]]]
    prompts = [it.model.prompt("What?", images) for images in pictures]
    together = it.model.encode_images(prompts)
    assert together[1] is None
    for prompt, features in zip(prompts, together):
        if prompt.vision:
            close(features, it.model.encode_images([prompt])[0], atol=5e-6)


def test_marks_in_the_question(golden):
    it = golden["minicpmv26"]
    first, second = it.images[:2]
    blocks = it.model.prompt("Which is redder?", [first, second]).ids
    marked = it.model.ask("<image>\n<image>\nWhich is redder?", [first, second]).ids
    assert marked == blocks
    inline = it.model.ask("Is <image> redder than <image>?", [first, second]).ids
    assert inline != blocks
    assert "Is " in it.model.tokenizer.decode(inline[: inline.index(IMAGE_SLOT)])
    text = it.model.tokenizer.decode([i for i in blocks if i != IMAGE_SLOT])
    assert "<image_id>0</image_id><image></image>" in text
    assert "<image_id>1</image_id><image></image>" in text
    with pytest.raises(RecordError, match="control_token"):
        it.model.ask("<slice>" + "<unk>" * 8 + "</slice>?", [first])


def test_stop_tokens_and_defaults_are_the_checkpoints(golden):
    for family in VERSIONS:
        it = golden[family]
        assert it.model.stop_token_ids == set(it.record["eos_ids_used"])
        stated = json.loads((GOLDEN / family / "generation_config.json").read_text())
        assert it.model.generation_defaults == stated


@pytest.mark.parametrize("side", [70, 11])
def test_positions_are_the_cells_in_which_patches_fall(side):
    """Also beyond the table's size. On a cell's edge, rounding decides: it is that of 2024."""
    for count in range(1, 300):
        cells = bucket_positions(1, count, side)
        for patch, cell in enumerate(cells.tolist()):
            exact, rest = divmod(patch * side, count)
            assert cell == exact or (rest == 0 and cell == exact - 1), (count, patch)
        num_patches = torch.ones(count, dtype=torch.bool).sum()
        places = torch.arange(0, 1 - 1e-6, 1 / num_patches)
        edges = torch.arange(1 / side, 1.0, 1 / side)
        assert torch.equal(cells, torch.bucketize(places, edges, right=True)), count


# -- checkpoints of another shape, written and computed by hand ------------------------------------


def pictures() -> list[Image.Image]:
    """Unsliced, sliced into columns, sliced into rows; of several modes."""
    small = Image.linear_gradient("L").rotate(20).resize((61, 40))
    wide = Image.linear_gradient("L").rotate(45).resize((180, 61)).convert("RGB")
    return [small, wide, Image.radial_gradient("L").resize((75, 120)).quantize(20)]


OVERVIEW = "<image>" + "<unk>" * 5 + "</image>"
BLOCKS = {
    "2.5": [
        OVERVIEW,
        f"{OVERVIEW}<slice>{OVERVIEW * 3}</slice>",
        f"{OVERVIEW}<slice>{OVERVIEW}\n{OVERVIEW}</slice>",
    ],
    "2.6": [
        f"<image_id>0</image_id>{OVERVIEW}",
        f"<image_id>1</image_id>{OVERVIEW}" + ("<slice>" + "<unk>" * 5 + "</slice>") * 3,
        f"<image_id>2</image_id>{OVERVIEW}" + "\n".join(["<slice>" + "<unk>" * 5 + "</slice>"] * 2),
    ],
}
TEMPLATES = {
    "2.5": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "2.6": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("dropped", [0, 1], ids=["all-layers", "last-layer-dropped"])
@pytest.mark.parametrize("version", ["2.5", "2.6"])
@torch.no_grad()
def test_another_shape_computes_what_is_written_out_by_hand(tmp_path, version, dropped):
    shape = writers.shape(version, dropped_layers=dropped)
    tensors = writers.random_weights(shape, seed=dropped)
    model = load_model(writers.write(tmp_path / "m", shape, tensors), CPU)
    prompt = model.prompt("What is\nin these?", pictures())
    text = TEMPLATES[version].format("\n".join([*BLOCKS[version], "What is\nin these?"]))
    tokenizer = Tokenizer.from_file(str(writers.TOKENIZERS[version] / "tokenizer.json"))
    expected_ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert unfilled(prompt.ids, f"minicpmv{version.replace('.', '')}") == expected_ids

    pieces = [p for image in pictures() for p in writers.reference_pieces(image, shape)[0]]
    assert len(pieces) == len(prompt.vision) == 8
    for piece, expected in zip(prompt.vision, pieces):
        strip = torch.cat(list(expected.patches), dim=2)
        close(piece.pixels.double(), strip, atol=1e-6)
    expected = writers.reference_features(tensors, shape, pieces)
    [features] = model.encode_images([prompt])
    close(features.double(), expected, atol=1e-5)

    answer = [41, 172, 93]
    logits = sequence_logits(model, prompt, features, answer).double()
    truth = writers.reference_logits(tensors, shape, prompt.ids + answer, expected)
    close(logits, truth, atol=1e-5)
    close(logits.log_softmax(-1), truth.log_softmax(-1), atol=1e-5)
    assert greedy(model, prompt, features, 1) == [int(truth[len(prompt) - 1].argmax())]


@torch.no_grad()
def test_25_without_batch_vision_input_encodes_each_slice_alone(tmp_path):
    shape = writers.shape("2.5")
    tensors = writers.random_weights(shape)
    folder = writers.write(tmp_path / "m", shape, tensors, batch_vision_input=False)
    model = load_model(folder, CPU)
    [features] = model.encode_images([model.prompt("What?", pictures()[1:2])])
    pieces, _ = writers.reference_pieces(pictures()[1], shape)
    expected = [writers.reference_features(tensors, shape, [piece]) for piece in pieces]
    close(features.double(), torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("version", ["2.5", "2.6"])
def test_any_picture_is_cut_as_by_hand(tmp_path, version):
    shape = writers.shape(version, max_slices=9)
    model = load_model(writers.write(tmp_path / "m", shape, writers.random_weights(shape)), CPU)
    sizes = [(3, 400), (500, 9), (70, 70), (71, 70), (14, 14), (1, 1), (333, 127), (211, 212)]
    for size in sizes:
        image = Image.linear_gradient("L").resize(size)
        pieces, _ = writers.reference_pieces(image, shape)
        cut = model.prompt("What?", [image]).vision
        assert [(p.rows, p.columns) for p in cut] == [(p.rows, p.columns) for p in pieces], size


BROKEN = {
    "missing": ("drop", "resampler.proj", "lacks 1 tensor of Resampler: proj"),
    "tower": ("drop", "vpm.post_layernorm.bias", "SiglipVisionModel: post_layernorm.bias"),
    "language": ("drop", "llm.model.norm.weight", "Qwen2ForCausalLM: model.norm.weight"),
    "extra": ("add", "vpm.head.probe", "unexpected tensor: vpm.head.probe"),
    "shape": ("add", "resampler.query", "resampler.query has shape"),
}


@pytest.mark.parametrize(("change", "name", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, change, name, says):
    shape = writers.shape("2.6")
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
        ({"version": 4.5}, r"version 4\.5; versions 2\.5 and 2\.6 are supported"),
        ({"query_num": 6}, "query_num 6, preprocessor_config.json says image_feature_size 5"),
        ({"slice_config": {"max_slice_nums": 4}}, r"slice_config\.max_slice_nums 4"),
        ({"slice_mode": False}, "slice_mode false"),
        ({"version": "2.5"}, "unexpected tensors: llm.model.layers"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, says):
    shape = writers.shape("2.6")
    folder = writers.write(tmp_path / "m", shape, writers.random_weights(shape), **changes)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, CPU)


def test_equal_towers_are_loaded_once(tmp_path):
    shape = writers.shape("2.6")
    first, second = (
        load_model(writers.write(tmp_path / name, shape, writers.random_weights(shape)), CPU)
        for name in ("a", "b")
    )
    assert first.tower is second.tower
    assert first.backbone is not second.backbone


def test_the_family_is_read_from_the_config(tmp_path):
    shape = writers.shape("2.5")
    folder = writers.write(tmp_path / "llava-critic-7b", shape, writers.random_weights(shape))
    assert detect_family(folder) == "minicpm_v"
    assert detect_family(folder, name_hint="MiniCPM-Llama3-V-2_5") == "minicpm_v"
    with pytest.raises(CheckpointError, match="promises llava_onevision"):
        detect_family(folder, name_hint="llava-critic-7b")


def unfilled(ids: list[int], family: str) -> list[int]:
    return [UNK[family] if token == IMAGE_SLOT else token for token in ids]


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
