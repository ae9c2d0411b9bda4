"""The GPU path: captured decode steps draw what eager ones draw. Runs where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stream_engine.config import ModelConfig
from stream_engine.engine import Engine, ResolvedSampling
from stream_engine.models import load_model
from tests.engine.conftest import ask, full_forward_logps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def cuda_engine(checkpoint):
    def make(*, max_rows: int = 64, **values: object) -> Engine:
        defaults = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": 20,
        }
        model = load_model(checkpoint, ModelConfig(device="cuda", dtype="float32"))
        return Engine(model, ResolvedSampling(**(defaults | values)), max_rows=max_rows)

    return make


def rows_of(results) -> dict[str, list[list[int]]]:
    return {r.key: [row.token_ids for row in r.rows] for r in results}


def test_captured_steps_draw_what_eager_steps_draw(cuda_engine):
    captured, eager = cuda_engine(), cuda_engine()
    assert captured.decoder.graphs is not None
    eager.decoder.graphs = None
    assert rows_of(captured.generate(ask(captured, 6))) == rows_of(eager.generate(ask(eager, 6)))
    assert captured.decoder.graphs.graphs


def test_captured_logps_equal_a_full_forward(cuda_engine):
    engine = cuda_engine()
    requests = {r.key: r for r in ask(engine, 5)}
    for result in engine.generate(requests.values()):
        for row in result.rows:
            model = engine.model
            model.set_attention("sdpa")
            prompt = requests[result.key].prompt
            with torch.no_grad():
                features = model.encode_images([prompt])[0]
                ids = torch.tensor(row.token_ids, device="cuda")
                embeds = torch.cat([model.assemble(prompt, features), model.embed(ids)])
                positions = torch.arange(len(embeds), device="cuda")
                logits = model.lm_head(model.forward(embeds, positions)).double()
            model.set_attention("stream_engine")
            logps = torch.log_softmax(logits[len(prompt) - 1 : -1, : model.vocab_size], dim=-1)
            expected = logps.gather(1, ids[:, None])[:, 0].tolist()
            assert row.token_logps == pytest.approx(expected, abs=1e-4)


def test_refilled_batches_draw_the_same(cuda_engine):
    roomy, tight = cuda_engine(), cuda_engine(max_rows=5)
    assert rows_of(roomy.generate(ask(roomy, 7))) == rows_of(tight.generate(ask(tight, 7)))


def test_cpu_and_gpu_score_alike(cuda_engine, make_engine):
    gpu, cpu = cuda_engine(), make_engine()
    prompt = ask(cpu, 1)[0].prompt
    answer = [5, 9, 200, 31]
    from stream_engine.engine import ScoreRequest

    result = next(gpu.score([ScoreRequest("k", ask(gpu, 1)[0].prompt, (tuple(answer),))]))
    assert result.token_logps[0] == pytest.approx(full_forward_logps(cpu, prompt, answer), abs=1e-3)


def eager(engine: Engine) -> Engine:
    engine.decoder.graphs = None
    return engine


def test_a_single_row_is_drawn(cuda_engine):
    """Kernels are compiled anew for a count of one."""
    captured, plain = cuda_engine(max_rows=1), eager(cuda_engine(max_rows=1))
    expected = rows_of(plain.generate(ask(plain, 3, rows=1)))
    assert rows_of(captured.generate(ask(captured, 3, rows=1))) == expected
    assert captured.decoder.graphs is not None, "decode steps could not be captured"


def test_a_repetition_penalty_is_captured_too(cuda_engine):
    captured, plain = (cuda_engine(max_rows=6, repetition_penalty=1.3) for _ in range(2))
    eager(plain)
    assert rows_of(captured.generate(ask(captured, 6))) == rows_of(plain.generate(ask(plain, 6)))
    assert captured.decoder.graphs is not None and captured.decoder.graphs.graphs


def test_steps_are_captured_again_when_the_cache_grows(cuda_engine):
    """Rows with prompts of their own, longer than what a slot was planned to hold."""

    def requests(engine: Engine):
        for request in ask(engine, 6, rows=2):
            own = tuple(range(5, 45))
            yield replace(request, rows=tuple(replace(r, suffix_ids=own) for r in request.rows))

    captured, plain = cuda_engine(), eager(cuda_engine())
    for _ in range(2):
        assert rows_of(captured.generate(ask(captured, 3))) == rows_of(
            plain.generate(ask(plain, 3))
        )
        assert rows_of(captured.generate(requests(captured))) == rows_of(
            plain.generate(requests(plain))
        )
    assert captured.decoder.graphs is not None


def test_graphs_of_two_engines_take_turns(cuda_engine):
    """Each keeps its own stream and pool: dropping one's graphs leaves the other's whole."""
    one, other, plain = cuda_engine(), cuda_engine(), eager(cuda_engine())
    expected = rows_of(plain.generate(ask(plain, 5)))
    for _ in range(3):
        assert rows_of(one.generate(ask(one, 5))) == expected
        assert rows_of(other.generate(ask(other, 5))) == expected
        one.free_memory()  # its graphs are captured anew, into a new pool
    one.close()
    assert rows_of(other.generate(ask(other, 5))) == expected
    assert other.decoder.graphs is not None
