"""Native architectures through the engine, against each model's own class, generate and forward."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.engine import (
    Engine,
    GenerateRequest,
    Generation,
    RowRequest,
    ScoredContinuations,
    ScoreRequest,
    load_engine,
    resolve_sampling,
)
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models import detect_family, load_model
from stream_engine.models.base import Prompt, cache_argument
from stream_engine.models.native import naming_architecture
from stream_engine.records import IMAGE_MARK
from tests.models.hf_architectures import ARCHITECTURES
from tests.models.writers_hf import write_hf

CPU = ModelConfig(device="cpu", dtype="float32")
NUM_TOKENS = 8


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One architecture: our engine around it, and the model's own class beside it."""
    folder = write_hf(tmp_path_factory.mktemp("hf") / request.param, request.param)
    model = load_model(folder, CPU)
    sampling = SamplingConfig(temperature=0, top_p=1.0, top_k=0, max_new_tokens=NUM_TOKENS)
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        engine=Engine(model, resolve_sampling(sampling, {})),
        own=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(),
    )


def pictures() -> list[Image.Image]:
    """A wide coloured picture and a tall grey one."""
    bands = [Image.linear_gradient("L").rotate(90 * n).resize((70, 45)) for n in range(3)]
    return [Image.merge("RGB", bands), Image.radial_gradient("L").resize((30, 60))]


def prompts(engine: Engine) -> dict[str, Prompt]:
    """Questions with one picture, none, two, and another one."""
    first, second = pictures()
    return {
        "one": engine.model.prompt("What is this?", [first]),
        "none": engine.model.prompt("Who are you, and why?", []),
        "two": engine.model.prompt("Which is larger?", [second, first]),
        "other": engine.model.prompt("What is this?", [second]),
    }


def inputs_of(prompt: Prompt, token_ids: list[int]) -> dict[str, Tensor]:
    """What the model's own class is given for a prompt and tokens after it."""
    inputs = {"input_ids": torch.tensor([prompt.ids + token_ids])}
    for name, value in prompt.vision.items():
        if name.endswith("token_type_ids"):
            value = torch.cat([value, value.new_zeros(1, len(token_ids))], dim=1)
        inputs[name] = value
    return inputs


@torch.no_grad()
def own_logps(own: Any, prompt: Prompt, token_ids: list[int]) -> Tensor:
    """Log-probs of the tokens after a prompt, by one full forward of the model's own class."""
    if hasattr(own.base_model, "rope_deltas"):
        own.base_model.rope_deltas = None
    logits = own(**inputs_of(prompt, token_ids), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def test_the_family_is_hf_vlm(native):
    assert detect_family(native.folder) == "hf_vlm"


def test_the_prefix_is_shared_where_it_can_be_and_the_engine_says_so(native):
    shares = ARCHITECTURES[native.name].shares_prefix
    assert native.engine.model.shares_prefix is shares
    assert native.engine.describe()["attention"] == ("shared prefix" if shares else "plain")


def test_the_cache_is_given_under_the_name_that_the_library_wants(native):
    """Each model whose prefix is not shared printed a FutureWarning: `past_key_values` is
    deprecated."""
    asked = [GenerateRequest(k, p, (RowRequest(1),)) for k, p in prompts(native.engine).items()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert all(isinstance(one, Generation) for one in native.engine.generate(asked))
        native.engine.model.extend_cached(
            native.engine.model.embed(torch.tensor([[1]])),
            torch.tensor([[0]]),
            transformers.DynamicCache(config=native.engine.model.backbone.config),
        )


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_library_without_the_new_name_is_given_the_old_one(name: str):
    functions = {
        "cache": lambda self, ids, cache=None, **kwargs: None,
        "past_key_values": lambda self, ids, past_key_values=None, **kwargs: None,
    }
    assert cache_argument(type("Model", (), {"forward": functions[name]})) == name


def test_greedy_answers_are_those_of_the_models_own_generate(native):
    """Four questions at once; log-probs against one full forward each."""
    asked = prompts(native.engine)
    requests = [GenerateRequest(k, p, (RowRequest(1), RowRequest(2))) for k, p in asked.items()]
    placeholders = list(native.engine.model.suppressed_token_ids)
    for result in native.engine.generate(requests):
        assert isinstance(result, Generation), result
        prompt = asked[result.key]
        if hasattr(native.own.base_model, "rope_deltas"):
            native.own.base_model.rope_deltas = None
        inputs = inputs_of(prompt, [])
        expected = native.own.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            suppress_tokens=placeholders,
            top_p=None,
            temperature=None,
        )[0, len(prompt) :].tolist()
        for row in result.rows:
            drawn = row.token_ids + ([] if row.end_token_id is None else [row.end_token_id])
            assert drawn == expected
            logps = row.token_logps + ([] if row.end_logp is None else [row.end_logp])
            truth = own_logps(native.own, prompt, drawn)
            torch.testing.assert_close(torch.tensor(logps), truth, atol=1e-5, rtol=0)


def test_scores_are_those_of_a_full_forward(native):
    """Rows of unequal length, prompts with unequal positions."""
    continuations = ((5, 6, 7, 8, 9), (40,), (30, 257))
    asked = prompts(native.engine)
    requests = [ScoreRequest(key, prompt, continuations) for key, prompt in asked.items()]
    results = list(native.engine.score(requests))
    assert [result.key for result in results] == list(asked)
    for result in results:
        assert isinstance(result, ScoredContinuations), result
        for row, logps in zip(continuations, result.token_logps, strict=True):
            truth = own_logps(native.own, asked[result.key], list(row))
            torch.testing.assert_close(torch.tensor(logps), truth, atol=1e-5, rtol=0)


def test_another_picture_gives_another_score(native):
    asked = prompts(native.engine)
    requests = [ScoreRequest(key, asked[key], ((5, 6, 7),)) for key in ("one", "other")]
    one, other = native.engine.score(requests)
    assert one.token_logps != other.token_logps
    assert asked["one"].digest.pixels != asked["other"].digest.pixels


def test_the_picture_is_encoded_once_a_question(native):
    """Vision towers run while the prompt is prefilled, and never for an answer."""
    prompt = prompts(native.engine)["one"]
    model = native.engine.model
    calls = []
    name = next(n for n in ("vision_tower", "visual", "vision_model") if hasattr(model.core, n))
    hook = getattr(model.core, name).register_forward_hook(lambda *_: calls.append(1))
    rows = tuple(RowRequest(seed) for seed in range(3))
    list(native.engine.generate([GenerateRequest("one", prompt, rows)]))
    hook.remove()
    assert calls == [1]


def test_a_spelled_out_placeholder_is_refused(native):
    model = native.engine.model
    token = model.tokenizer.convert_ids_to_tokens(model.suppressed_token_ids[0])
    if token == IMAGE_MARK:
        token = model.tokenizer.eos_token
    with pytest.raises(RecordError, match="control_token"):
        model.ask(f"Who {token}is?", pictures()[:1])


@pytest.mark.parametrize("asked", ["<image>\nWho is?", "Who is?\n<image>"])
def test_marks_at_the_ends_of_a_question_put_the_picture_first(native, asked):
    model, picture = native.engine.model, pictures()[:1]
    assert model.ask(asked, picture).ids == model.ask("Who is?", picture).ids


def test_a_mark_inside_a_question_is_the_pictures_place_where_the_template_lets_it(native):
    """Templates that put all pictures first are noticed, and the question says so."""
    model, picture = native.engine.model, pictures()[:1]
    question = "Who <image> is?"
    ids = model.ask(question, picture).ids
    first = model.ask("Who  is?", picture).ids
    assert (ids == first) != model.places_images
    assert model.asked(question, 1) == (question if model.places_images else "Who  is?")
    if model.places_images:
        place = next(i for i, token in enumerate(ids) if token in model.suppressed_token_ids)
        assert "Who " in model.tokenizer.decode(ids[:place])
        assert " is?" in model.tokenizer.decode(ids[place:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_finds_images_that_see_both_ways(tmp_path, dtype):
    """Were Gemma 3 not known for it, its first question about a picture would tell.

    In bfloat16 it did not: what the image tokens see of each other moves hidden states by 0.01,
    which rounding explains, and the model was run with the wrong attention.
    """
    config = ModelConfig(device="cpu", dtype=dtype)
    model = load_model(write_hf(tmp_path / "gemma3", "gemma3"), config)
    model.shares_prefix = True
    engine = Engine(model, resolve_sampling(SamplingConfig(), {}))
    assert not engine.model.shares_prefix
    assert engine.self_test["unsupported"] == "tokens of a picture see later ones"


def test_answers_differ_though_the_checkpoint_suggests_greedy_decoding(tmp_path, caplog):
    """Qwen2-VL's own generation_config.json made ten equal answers, of which no pair can come."""
    folder = write_hf(tmp_path / "m", "qwen2_5_vl")
    change_json(folder, "generation_config.json", top_k=1, top_p=0.001, temperature=0.01)
    role = ModelRole("instruct", str(folder), "rollouts")
    engine = load_engine(role, CPU, SamplingConfig(max_new_tokens=12))
    prompt = engine.model.prompt("What is this?", pictures()[:1])
    rows = tuple(RowRequest(seed) for seed in range(10))
    [result] = engine.generate([GenerateRequest("q", prompt, rows)])
    assert len({tuple(row.token_ids) for row in result.rows}) > 5
    assert caplog.text.count("describes greedy decoding (top_k 1)") == 1
    assert engine.describe()["sampling_sources"]["top_k"].startswith("default (the checkpoint's")


def test_a_prompt_cut_to_what_questions_share_prefills_alike(tmp_path):
    """Per-token inputs of the processor are cut with the ids."""
    model = load_model(write_hf(tmp_path / "m", "qwen2_5_vl"), CPU)
    whole = model.prompt("What is this?", pictures()[:1])
    cut = replace(whole, ids=whole.ids[:-9])
    with torch.no_grad():
        model.prefill([cut], [None])
        model.prefill([whole], [None])
    assert whole.next_position - cut.next_position == 9
    assert whole.next_position < len(whole)


def change_json(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    stated = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def no_norm(folder: Path) -> str:
    tensors = tensors_of(folder)
    del tensors[next(name for name in tensors if name.endswith("norm.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return r"lacks 1 tensor: .*norm\.weight"


def extra(folder: Path) -> str:
    tensors = tensors_of(folder) | {"model.adapter.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return r"has unexpected 1 tensor: model\.adapter\.weight"


def misshapen(folder: Path) -> str:
    tensors = tensors_of(folder)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file(tensors | {name: torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    return r"has misshapen 1 tensor: .*norm\.weight"


def half(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return r"model\.safetensors is truncated"


def adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("{}")
    return "LoRA adapter"


def no_template(folder: Path) -> str:
    (folder / "chat_template.jinja").unlink()
    return "has no chat template"


def template_of_plain_texts(folder: Path) -> str:
    """The list of texts and pictures was asked as Python writes it."""
    template = "{% for m in messages %}USER: {{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return "its chat template makes .* of 'THE QUESTION', which is not what a user says"


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return r"has none of tokenizer\.json"


def length_as_text(folder: Path) -> str:
    """Each question was rejected by itself, with a TypeError."""
    change_json(folder, "tokenizer_config.json", model_max_length="2048")
    return r"tokenizer_config\.json: model_max_length is '2048', not a number"


def whole_numbers(folder: Path) -> str:
    """They were taken for the weights."""
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t.to(torch.int8) for k, t in tensors.items()}, folder / "model.safetensors")
    return r"the weights are quantised \(they are torch\.int8\) .* unquantised"


def foreign_processor(folder: Path) -> str:
    change_json(folder, "processor_config.json", processor_class="OtherProcessor")
    return "transformers has no class OtherProcessor"


def encoder_decoder(folder: Path) -> str:
    kind = {"model_type": "florence2", "architectures": ["Florence2ForConditionalGeneration"]}
    change_json(folder, "config.json", **kind)
    return "is florence2, which has an encoder-decoder; not supported"


def prompt_read_both_ways(folder: Path) -> str:
    """Its files were blamed: "its language model is not causal as loaded"."""
    kind = {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"]}
    change_json(folder, "config.json", **kind)
    return "is paligemma, which has a prompt that is read in both directions; not supported"


def unknown(folder: Path) -> str:
    kind = {"model_type": "novel_vl", "architectures": ["NovelForConditionalGeneration"]}
    change_json(folder, "config.json", **kind)
    return r"NovelForConditionalGeneration.*novel_vl.*not supported; supported families"


BREAKS = [
    no_norm,
    extra,
    misshapen,
    half,
    adapter,
    no_template,
    template_of_plain_texts,
    no_tokenizer,
    length_as_text,
    whole_numbers,
    foreign_processor,
    encoder_decoder,
    prompt_read_both_ways,
    unknown,
]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, break_it):
    folder = write_hf(tmp_path / "m", "internvl")
    says = break_it(folder)
    with pytest.raises(CheckpointError, match=says) as error:
        load_model(folder, CPU)
    assert "\n" not in str(error.value)


def test_logits_that_cannot_be_reproduced_are_refused(tmp_path, monkeypatch):
    """A class that does something of its own to its logits is named, not scored wrongly."""
    own_class = transformers.InternVLForConditionalGeneration
    own_forward = own_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own_forward(self, *args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output

    monkeypatch.setattr(own_class, "forward", forward)
    with pytest.raises(CheckpointError, match="InternVLForConditionalGeneration changes its logit"):
        load_model(write_hf(tmp_path / "m", "internvl"), CPU)


def test_a_picture_that_the_processor_refuses_is_a_bad_record(tmp_path):
    model = load_model(write_hf(tmp_path / "m", "qwen2_5_vl"), CPU)
    with pytest.raises(RecordError, match="unprocessable_image"):
        model.prompt("What?", [Image.new("RGB", (900, 2))])


def test_a_logit_rule_that_the_class_leaves_out_is_left_out_with_a_warning(tmp_path, caplog):
    """transformers' LLaVA-NeXT does not divide by Granite's logits_scaling, nor do we."""
    model = load_model(write_hf(tmp_path / "m", "granite"), CPU)
    assert model.logit_scale == 1.0
    assert "states logit scale 0.25" in caplog.text


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        pytest.param("index 9 is out of range", True, id="its-own-code"),
        pytest.param("CUDA error: out of memory", False, id="memory"),
        pytest.param("CUDA error: an illegal memory access was encountered", False, id="lost"),
    ],
)
def test_no_architecture_is_blamed_for_its_device(text: str, is_named: bool) -> None:
    """Two ranks on one full GPU: the second was told that its model is not supported."""
    expected = CheckpointError if is_named else RuntimeError
    naming = naming_architecture(Path("checkpoint"), torch.nn.Linear(1, 1))
    with pytest.raises(expected, match=text) as raised, naming:
        raise RuntimeError(text)
    assert isinstance(raised.value, CheckpointError) == is_named
