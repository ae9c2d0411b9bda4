"""Two tiny random LLaVA checkpoints (grouped-query and multi-head), really loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from stream_engine.config import ModelConfig
from stream_engine.engine import Engine, GenerateRequest, ResolvedSampling, RowRequest, row_seed
from stream_engine.engine import planner as planner_module
from stream_engine.models import load_model
from tests.models import writers_llava as writers

SHAPES = {
    "gqa": writers.Shape(),
    "mha": writers.Shape(hidden=64, layers=3, heads=4, kv_heads=4, mlp=96, image=56),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=["gqa", "mha"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the original format, with weights large enough that tokens differ."""
    weights = writers.random_weights(SHAPES[request.param], seed=3)
    folder = tmp_path_factory.mktemp(request.param) / "llava"
    writers.write_original(folder, weights)
    return folder


@pytest.fixture
def make_engine(checkpoint: Path) -> Callable[..., Engine]:
    """Load the checkpoint into an engine; keywords are sampling values and batch bounds."""

    def make(*, max_rows: int | None = None, max_tokens: int | None = None, **values: object):
        defaults = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": 12,
        }
        sampling = ResolvedSampling(**(defaults | values))
        model = load_model(checkpoint, ModelConfig())
        return Engine(model, sampling, max_rows=max_rows, max_batch_tokens=max_tokens)

    return make


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    size = (20 + 7 * number, 50 - 3 * (number % 8))
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def ask(engine: Engine, count: int, *, rows: int = 4, seed: int = 0) -> list[GenerateRequest]:
    """Questions of different lengths, every third without an image."""
    requests = []
    for number in range(count):
        images = [] if number % 3 == 2 else [picture(number)]
        prompt = engine.model.prompt("what is this " * (1 + number % 4) + "?", images)
        drawn = tuple(RowRequest(row_seed(seed, str(number), j)) for j in range(rows))
        requests.append(GenerateRequest(str(number), prompt, drawn))
    return requests


@torch.no_grad()
def full_forward_logps(engine: Engine, prompt, answer: list[int]) -> list[float]:
    """Token log-probs of an answer from one ordinary causal forward over everything."""
    model = engine.model
    model.set_attention("sdpa")
    features = model.encode_images([prompt])[0]
    ids = torch.tensor(answer, device=model.device)
    embeds = torch.cat([model.assemble(prompt, features), model.embed(ids)])
    positions = torch.arange(len(embeds), device=model.device)
    logits = model.lm_head(model.forward(embeds, positions)).double()
    model.set_attention("stream_engine")
    first = len(prompt) - 1
    logps = torch.log_softmax(logits[first : first + len(answer), : model.vocab_size], dim=-1)
    return logps.gather(1, ids[:, None])[:, 0].tolist()


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the machine say that so much is free."""
    monkeypatch.setattr(planner_module, "host_available", lambda share: num_bytes // share)


def scored(row) -> tuple[list[int], list[float]]:
    """Ids and log-probs of a row, the end token included when it was drawn."""
    if row.end_token_id is None:
        return row.token_ids, row.token_logps
    return [*row.token_ids, row.end_token_id], [*row.token_logps, row.end_logp]


def drawn(results) -> dict[str, list[list[int]]]:
    return {result.key: [scored(row)[0] for row in result.rows] for result in results}
