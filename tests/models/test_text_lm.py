"""Text models through the engine, against each model's own class, generate and forward."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM

from stream_engine.config import ModelConfig, SamplingConfig
from stream_engine.engine import (
    Engine,
    GenerateRequest,
    Generation,
    RowRequest,
    ScoredContinuations,
    ScoreRequest,
    resolve_sampling,
)
from stream_engine.engine.decode import GraphDecoder
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models import detect_family, load_model
from stream_engine.models.base import VisionLanguageModel
from tests.models.writers_hf import SPECIALS, TEXT, byte_tokenizer, randomize

CPU = ModelConfig(device="cpu", dtype="float32")
NUM_TOKENS = 8
LLAMA_3 = (
    "{{ '<|bos|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TURNS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
EOT = 262
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
    "original_max_position_embeddings": 120,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

# model type -> (settings of its config, whether the prefix can be shared)
ARCHITECTURES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "mistral": ({"sliding_window": 4096}, True),
    "qwen2": ({"tie_word_embeddings": True}, True),
    "phi3": ({}, True),
    "gpt2": ({"max_position_embeddings": 256}, True),
    "cohere": ({"logit_scale": 0.25, "tie_word_embeddings": True}, True),
    "granite": (
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
        True,
    ),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, True),
    "qwen3_moe": ({"num_experts": 4, **EXPERTS, "decoder_sparse_step": 1}, True),
    # values of another size than keys, two attentions a layer: the plain path
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **EXPERTS,
        },
        False,
    ),
    "diffllama": ({}, False),
    # short windows, capped attention scores, sinks, recurrent layers: the plain path
    "gemma3_text": ({**HYBRID, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}, False),
    "gemma2": (
        {
            **HYBRID,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
        False,
    ),
    "gpt_oss": ({**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}, False),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        False,
    ),
    "falcon_h1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        False,
    ),
    "jamba": (
        {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_d_state": 4},
        False,
    ),
    "qwen3_5_text": ({"layer_types": ["linear_attention", "full_attention"], **LINEAR}, False),
}


def write_text(folder: Path, model_type: str) -> Path:
    """A tiny random checkpoint with a Llama-3-like template and tokenizer."""
    settings, _ = ARCHITECTURES[model_type]
    config = type(transformers.AutoConfig.for_model(model_type))(**(TEXT | settings))
    torch.manual_seed(len(model_type))
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    tokenizer = byte_tokenizer(SPECIALS + TURNS)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(LLAMA_3)
    return folder


def engine_of(model: VisionLanguageModel) -> Engine:
    sampling = SamplingConfig(temperature=0, top_p=1.0, top_k=0, max_new_tokens=NUM_TOKENS)
    return Engine(model, resolve_sampling(sampling, {}))


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_text(tmp_path_factory.mktemp("text") / request.param, request.param)
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        engine=engine_of(load_model(folder, CPU)),
        own=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )


@torch.no_grad()
def own_logps(own: Any, ids: list[int], token_ids: list[int]) -> Tensor:
    logits = own(input_ids=torch.tensor([ids + token_ids]), use_cache=False).logits[0]
    logps = logits[len(ids) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


QUESTIONS = {"short": "Who?", "long": "What is in the picture, and where does it stand?"}


def test_the_prefix_is_shared_where_it_can_be(text):
    assert detect_family(text.folder) == "text_lm"
    assert text.engine.model.shares_prefix is ARCHITECTURES[text.name][1]


def test_greedy_answers_are_those_of_the_models_own_generate(text):
    prompts = {key: text.engine.model.prompt(q, []) for key, q in QUESTIONS.items()}
    requests = [GenerateRequest(key, p, (RowRequest(1),)) for key, p in prompts.items()]
    for result in text.engine.generate(requests):
        assert isinstance(result, Generation), result
        ids = prompts[result.key].ids
        expected = text.own.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=[257, EOT],
            temperature=None,
        )[0, len(ids) :].tolist()
        [row] = result.rows
        drawn = row.token_ids + ([] if row.end_token_id is None else [row.end_token_id])
        assert drawn == expected
        logps = row.token_logps + ([] if row.end_logp is None else [row.end_logp])
        torch.testing.assert_close(
            torch.tensor(logps), own_logps(text.own, ids, drawn), atol=1e-5, rtol=0
        )


def test_scores_are_those_of_a_full_forward(text):
    continuations = ((5, 6, 7, 8, 9), (40,), (30, EOT))
    prompts = {key: text.engine.model.prompt(q, []) for key, q in QUESTIONS.items()}
    requests = [ScoreRequest(key, prompt, continuations) for key, prompt in prompts.items()]
    for result in text.engine.score(requests):
        assert isinstance(result, ScoredContinuations), result
        for row, logps in zip(continuations, result.token_logps, strict=True):
            truth = own_logps(text.own, prompts[result.key].ids, list(row))
            torch.testing.assert_close(torch.tensor(logps), truth, atol=1e-5, rtol=0)


def test_next_token_logps_are_those_of_a_full_forward(text):
    prompt = text.engine.model.prompt("Who?", [])
    request = ScoreRequest("q", prompt, ((5, 6, 7), (8,)))
    [result] = text.engine.next_token_logps([request], [20, 30])
    for row, logps in zip(request.continuations, result.logps, strict=True):
        for token, logp in zip((20, 30), logps, strict=True):
            truth = own_logps(text.own, prompt.ids + list(row), [token])
            assert abs(logp - truth.item()) < 1e-5


def test_rows_go_on_from_tokens_of_their_own(text):
    """The same answers as to whole prompts, also where rows bring unequally many tokens."""
    prompt = text.engine.model.prompt("Who?", [])
    suffixes = [(5, 6, 7), (8,), (9,)]
    rows = tuple(RowRequest(1, suffix) for suffix in suffixes)
    [together] = text.engine.generate([GenerateRequest("q", prompt, rows)])
    for suffix, row in zip(suffixes, together.rows, strict=True):
        alone = text.engine.model.prompt("Who?", [])
        alone.ids += suffix
        alone.next_position += len(suffix)
        [whole] = text.engine.generate([GenerateRequest("q", alone, (RowRequest(1),))])
        assert row.token_ids == whole.rows[0].token_ids
        torch.testing.assert_close(row.token_logps, whole.rows[0].token_logps, atol=1e-5, rtol=0)


def test_a_long_prompt_does_not_change_the_scores_of_others(tmp_path, monkeypatch):
    """Phi-3's rotary factors are the longest text's of a forward: a batch mate moved log-probs."""
    monkeypatch.setitem(ARCHITECTURES, "phi3", (LONGROPE, True))
    engine = engine_of(load_model(write_text(tmp_path / "m", "phi3"), CPU))
    asked = [engine.model.prompt(question, []) for question in ("Who?", "Who? " * 30)]
    requests = [ScoreRequest(str(n), prompt, ((5, 6, 7),)) for n, prompt in enumerate(asked)]
    [alone] = engine.score(requests[:1])
    together = {result.key: result for result in engine.score(requests)}
    assert together["0"].token_logps == alone.token_logps
    refused = together["1"]
    assert refused.reason == "prompt_too_long"
    assert refused.detail.endswith("the model is run with 120 at most")


def test_an_answer_ends_where_rotary_factors_would_change(tmp_path, monkeypatch):
    """Its last tokens would be drawn with other factors than its prompt's keys were made with."""
    monkeypatch.setitem(ARCHITECTURES, "phi3", (LONGROPE, True))
    engine = engine_of(load_model(write_text(tmp_path / "m", "phi3"), CPU))
    engine.runner.stop_token_ids = frozenset()
    prompt = engine.model.prompt("W" * 92, [])
    assert len(prompt) == 115
    [result] = engine.generate([GenerateRequest("q", prompt, (RowRequest(1),))])
    assert len(prompt) + len(result.rows[0].token_ids) == 120
    assert result.rows[0].finish_reason == "length"


def test_a_row_that_has_ended_feeds_no_position_beyond_the_table(tmp_path):
    """Captured steps run on until the host reads: on a GPU such a lookup loses the device."""
    engines = [engine_of(load_model(write_text(tmp_path / "m", "gpt2"), CPU)) for _ in range(2)]
    plain, static = engines
    static.decoder.capture_with(GraphDecoder(static.runner))
    requests = []
    for number, words in enumerate(("W" * 231, "W" * 12)):  # to 2 places before the last
        prompt = plain.model.prompt(words, [])
        requests.append(GenerateRequest(str(number), prompt, (RowRequest(1),)))
    for engine in engines:
        engine.runner.stop_token_ids = frozenset()
    assert len(requests[0].prompt) == plain.runner.max_positions - 2 == 254
    expected, got = ({r.key: r.rows[0] for r in e.generate(requests)} for e in engines)
    assert [len(got[key].token_ids) for key in "01"] == [2, NUM_TOKENS]
    assert {k: r.token_ids for k, r in got.items()} == {k: r.token_ids for k, r in expected.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "llama", "llama")


def test_the_prompt_is_the_template_with_one_bos(llama):
    model = load_model(llama, CPU)
    ids = model.prompt("Hi", []).ids
    assert ids.count(model.tokenizer.bos_token_id) == 1
    assert model.tokenizer.decode(ids) == (
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_model_that_forgets_its_prompt_is_refused(tmp_path, monkeypatch):
    """Mamba's classes took no `past_key_values` and ignored it: one answer to every question."""
    own_class = transformers.FalconH1Model
    own_forward = own_class.forward

    def forward(self: Any, **kwargs: Any) -> Any:
        kept = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "cache")}
        return own_forward(self, **kept)

    monkeypatch.setattr(own_class, "forward", forward)
    model = load_model(write_text(tmp_path / "m", "falcon_h1"), CPU)
    with pytest.raises(CheckpointError, match="FalconH1Model does not go on from its prompt"):
        engine_of(model)


@pytest.mark.parametrize("step", ["load", "engine"])
def test_an_architecture_that_cannot_be_run_is_refused_by_name(llama, monkeypatch, step):
    """MPT, Llama 4 and others ended in an AttributeError of transformers' own code."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'to'")

    model = load_model(llama, CPU) if step == "engine" else None
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(CheckpointError, match=r"llama: Llama\w+ cannot be run .*AttributeError"):
        engine_of(model or load_model(llama, CPU))


def test_the_end_of_a_turn_stops_an_answer(llama):
    model = load_model(llama, CPU)
    assert model.stop_token_ids == {257, EOT}
    assert model.generation_defaults == {"temperature": 0.6}


def test_pictures_are_refused_record_by_record(llama):
    model = load_model(llama, CPU)
    with pytest.raises(RecordError, match="images_not_supported"):
        model.prompt("Hi", [Image.new("RGB", (8, 8))])


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    folder = write_text(tmp_path / "m", "llama")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("Hi", "its chat template makes 'Hi' of 'THE QUESTION'"),
        ("{{ raise_exception('say who you are') }}", "TemplateError: say who you are"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_asks_nothing_is_refused(tmp_path, template, says):
    """Each record failed by itself, or a question was asked that was not there."""
    folder = write_text(tmp_path / "m", "llama")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, CPU)


def test_a_text_model_without_its_tokenizer_is_refused_by_the_files_names(tmp_path):
    folder = write_text(tmp_path / "m", "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has none of tokenizer\.json, .*download its tok"):
        load_model(folder, CPU)


def test_a_bin_checkpoint_loads_and_a_pickled_payload_does_not(tmp_path, llama):
    folder = write_text(tmp_path / "m", "llama")
    tensors = load_model(folder, CPU).backbone.state_dict()
    (folder / "model.safetensors").unlink()
    stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
    stored["lm_head.weight"] = load_model(llama, CPU).lm_head.weight.data
    torch.save(stored, folder / "pytorch_model.bin")
    assert torch.equal(load_model(folder, CPU).lm_head.weight, stored["lm_head.weight"])
    torch.save(stored | {"x": SimpleNamespace()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds pickled Python objects"):
        load_model(folder, CPU)
