"""The CPU form: packed layers, a float32 head for bfloat16 weights, memory that stays mapped."""

from __future__ import annotations

import resource

import pytest
import torch
from stream_kernels.cpu import decode_layer, layer_steps
from stream_kernels.gemm import onednn_pays
from torch import nn

from stream_engine.config import ModelConfig
from stream_engine.engine import Engine, ResolvedSampling, ScoreRequest, fused_layers
from stream_engine.engine.cpu import OneDNNLinear, keep_freed_memory, pack_linears
from stream_engine.engine.fused_layers import FusedLayer, fuse_layers
from stream_engine.models import load_model
from tests.engine.conftest import ask, scored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(not onednn_pays(), reason="oneDNN is not this processor's choice")
def test_plain_linears_are_packed_and_others_kept(dtype):
    layers = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 16), nn.Linear(16, 8))
    layers = layers.to(dtype).requires_grad_(False)
    x = torch.randn(5, 32).to(dtype)
    expected = layers(x)
    assert pack_linears(layers, keep=layers[3]) == (2 if onednn_pays(dtype) else 0)
    assert type(layers[3]) is nn.Linear
    assert [type(layer) is OneDNNLinear for layer in (layers[0], layers[2])] == [
        onednn_pays(dtype)
    ] * 2
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(layers(x), expected, atol=tolerance)


def test_bfloat16_weights_yield_logps_that_scoring_confirms(checkpoint):
    """Logits rounded to bfloat16 were off by up to 3e-2 from what scoring computes."""
    model = load_model(checkpoint, ModelConfig(dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    sampling = ResolvedSampling(
        temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=1
    )
    engine = Engine(model, sampling)
    requests = ask(engine, 4)
    generated = {g.key: g for g in engine.generate(requests)}
    to_score = [
        ScoreRequest(r.key, r.prompt, tuple(tuple(row.token_ids) for row in generated[r.key].rows))
        for r in requests
    ]
    differences = []
    for answers in engine.score(to_score):
        for row, logps in zip(generated[answers.key].rows, answers.token_logps):
            differences += [abs(a - b) for a, b in zip(row.token_logps, logps)]
    assert len(differences) == 16
    assert max(differences) <= 1e-5


needs_layer_steps = pytest.mark.skipif(
    not layer_steps.serves(torch.float32), reason="needs AVX-512 and a C compiler"
)


@needs_layer_steps
def test_layers_in_fewer_passes_draw_the_same_answers(make_engine, monkeypatch):
    engine = make_engine()
    layers = engine.model.backbone.layers
    assert len(layers) > 1 and all(isinstance(layer, FusedLayer) for layer in layers)
    fused = {g.key: scored(g.rows[0]) for g in engine.generate(ask(engine, 3))}
    monkeypatch.setattr(fused_layers, "current_step", lambda: None)
    for plain in engine.generate(ask(engine, 3)):
        ids, logps = scored(plain.rows[0])
        assert fused[plain.key][0] == ids
        assert fused[plain.key][1] == pytest.approx(logps, abs=1e-5)


@needs_layer_steps
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_in_one_call_computes_the_same_bits(checkpoint, dtype, monkeypatch):
    model = load_model(checkpoint, ModelConfig(dtype=dtype))
    sampling = ResolvedSampling(
        temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=6
    )
    engine = Engine(model, sampling)
    taken = []
    run = decode_layer.DecodeLayers.run
    counted = lambda *arguments: taken.append(1) or run(*arguments)  # noqa: E731
    monkeypatch.setattr(decode_layer.DecodeLayers, "run", counted)
    in_one = {g.key: [scored(row) for row in g.rows] for g in engine.generate(ask(engine, 3))}
    if not taken:
        pytest.skip("the products of this format are torch's on this machine")
    assert len(taken) == len(model.backbone.layers) * 5  # the first token comes of the prompt
    monkeypatch.setattr(fused_layers, "_decodes_in_one_call", lambda *_: False)
    for apart in engine.generate(ask(engine, 3)):
        assert [scored(row) for row in apart.rows] == in_one[apart.key]
    assert len(taken) == len(model.backbone.layers) * 5


@needs_layer_steps
def test_a_layer_that_would_compute_something_else_stays_as_it_is(checkpoint, monkeypatch):
    backbone = load_model(checkpoint, ModelConfig()).backbone
    kinds = [type(layer) for layer in backbone.layers]
    with monkeypatch.context() as broken:
        broken.setattr(layer_steps, "rotary", lambda query, key, cosines, sines: None)
        assert fuse_layers(backbone) == 0
    backbone.layers[-1].mlp.act_fn = nn.GELU()
    assert [type(layer) for layer in backbone.layers] == kinds
    assert fuse_layers(backbone) == len(kinds) - 1
    assert type(backbone.layers[-1]) is kinds[-1]


def test_freed_memory_is_used_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("this C library does not say how it keeps memory")
    x = torch.ones(3 << 20)  # 12 MiB

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.mul(torch.mul(x, 2.0), 3.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 3000, "20 tensors of 3072 pages each were faulted in again"
