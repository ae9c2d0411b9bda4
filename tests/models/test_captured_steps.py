"""A decode step that a CUDA graph records asks the device nothing and makes nothing on the host.

Either ends a capture, which only a GPU would show; so every operator of a step is looked at, for
each family and architecture. Attention and sampling are left out: on CPU they have other forms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stream_kernels.cpu import panel_product
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stream_engine.config import ModelConfig
from stream_engine.engine import Engine, ResolvedSampling, attention_steps, decode
from stream_engine.engine.decode import GraphDecoder
from stream_engine.models import load_model
from tests.models.test_cuda import OWN, SHARED, checkpoint
from tests.models.test_text_lm import ARCHITECTURES as TEXT
from tests.models.test_text_lm import write_text

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")
"""Operators that wait for the device to say how large their result is, or what it is."""
MADE_ON_HOST = ("lift_fresh",)
"""torch.tensor of plain numbers: on a GPU a copy from memory that is not pinned."""


class Watch(TorchDispatchMode):
    """Notes the operators that a capture cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: set[str] = set()
        self.num_products = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        self.num_products += name in ("mm", "addmm", "_linear_pointwise", "bmm")
        if name in (*READS, *MADE_ON_HOST) or (
            name in ("index", "index_put", "index_put_")
            and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        ):
            self.forbidden.add(name)
        return function(*args, **(kwargs or {}))


NAMES = [*OWN, *SHARED, *(f"text-{name}" for name, (_, shares) in TEXT.items() if shares)]


@pytest.mark.parametrize(
    ("name", "penalty"), [*((name, 1.0) for name in NAMES), *((name, 1.3) for name in OWN)]
)
def test_a_step_reads_nothing_back_and_makes_nothing_on_the_host(
    name, penalty, tmp_path, monkeypatch
):
    if name.startswith("text-"):
        folder = write_text(tmp_path / "model", name.removeprefix("text-"))
    else:
        folder = checkpoint(name, tmp_path)
    model = load_model(folder, ModelConfig(device="cpu", dtype="float32"))
    sampling = ResolvedSampling(
        temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=penalty, max_new_tokens=8
    )
    engine = Engine(model, sampling, max_rows=4)
    runner = engine.runner
    runner.cache.preallocate(prefix_tokens=64, slots=5, slot_tokens=16)
    engine.decoder.capture_with(GraphDecoder(runner))

    def attend(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return query * 1

    def sample(logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return logits.argmax(dim=1), logits.amax(dim=1)

    monkeypatch.setattr(attention_steps, "prefix_attention", attend)
    # a GPU's products are torch's own
    monkeypatch.setattr(panel_product, "reads", lambda weight: False)
    monkeypatch.setattr("stream_engine.engine.draw.sample", sample)
    if runner.seen is not None:
        runner.seen.begin(range(5))
    step = decode._CapturedStep(runner, 4, 4, 4, site=engine.decoder.graphs.site)
    with torch.no_grad():
        step.warm_up()
        with Watch() as watch:
            step.step()
    assert watch.num_products > 2
    assert watch.forbidden == set()
