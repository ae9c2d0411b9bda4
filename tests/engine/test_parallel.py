"""A model split over two ranks, or with its layers offloaded, computes what one rank does.

The ranks are real processes with a gloo world and DeepSpeed's layers; each loads both tiny
checkpoints, draws, scores, and writes down what it got.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, MixtralConfig, Phi3Config, PreTrainedConfig
from transformers.models.qwen3_vl import Qwen3VLTextConfig

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.engine import Engine, ScoreRequest, load_engine
from stream_engine.engine.attention_steps import UnsupportedAttentionError
from stream_engine.engine.batching import TokenBudget
from stream_engine.engine.parallel import one_for_all, styles_of_layers
from stream_engine.errors import ConfigError, ParallelError
from tests.engine.conftest import SHAPES, ask
from tests.models import writers_llava as writers
from tests.processes import context

SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12)
WATCHED = [3, 4, 5]
TOLERANCE = 1e-4

Computed = dict[str, Any]


def compute(checkpoint: Path, **settings: Any) -> Computed:
    """What an engine draws and scores, as JSON keeps it."""
    role = ModelRole("instruct", str(checkpoint), "rollouts")
    engine = load_engine(role, ModelConfig(device="cpu", **settings), SAMPLING)
    requests = ask(engine, 5)
    drawn = {result.key: result.rows for result in engine.generate(requests)}
    continued = [
        ScoreRequest(r.key, r.prompt, tuple(tuple(row.token_ids) for row in drawn[r.key]))
        for r in requests
    ]
    return {
        "ids": {key: [row.token_ids for row in rows] for key, rows in drawn.items()},
        "logps": {key: [row.token_logps for row in rows] for key, rows in drawn.items()},
        "scores": {r.key: r.token_logps for r in engine.score(continued)},
        "next": {r.key: r.logps for r in engine.next_token_logps(continued, WATCHED)},
        "heads": [store.prefix_key.shape[0] for store in engine.runner.cache.layers.values()],
        "layers": sorted(kinds_of_layers(engine)),
        "says": {k: engine.describe()[k] for k in ("bytes", "tensor_parallel", "offload")},
    }


def kinds_of_layers(engine: Engine) -> set[str]:
    """The classes of the layers inside the language model's attention and MLPs."""
    return {
        type(layer).__name__
        for name, layer in engine.model.backbone.named_modules()
        if name.endswith("_proj")
    }


def run_rank(rank: int, size: int, folder: str, settings: dict[str, Any]) -> None:
    """One rank's process: every checkpoint in the folder, with these settings."""
    torch.set_num_threads(1)
    if size > 1:
        store = torch.distributed.FileStore(f"{folder}/store", size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    computed = {name: compute(Path(folder) / name, **settings) for name in SHAPES}
    mode = "_".join(map(str, settings.values()))
    (Path(folder) / f"{mode}-{rank}.json").write_text(json.dumps(computed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both checkpoints, and what two ranks, and one with offload, computed with them."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, shape in SHAPES.items():
        writers.write_original(folder / name, writers.random_weights(shape, seed=3))
    split, offloaded = {"tensor_parallel": 2}, {"offload": "cpu"}
    ranks = [(0, 2, str(folder), split), (1, 2, str(folder), split), (0, 1, str(folder), offloaded)]
    processes = [context.Process(target=run_rank, args=rank) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    return folder


def computed_by(folder: Path, rank: str, shape: str) -> Computed:
    return json.loads((folder / f"{rank}.json").read_text())[shape]


def difference(some: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference between two tables of log-probs of the same shape."""
    assert some.keys() == other.keys()
    pairs = [
        pair
        for key in some
        for row, row_other in zip(some[key], other[key], strict=True)
        for pair in zip(row, row_other, strict=True)
    ]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", ["2-0", "2-1", "cpu-0"])
def test_a_spread_model_draws_and_scores_as_one_rank_does(
    folder: Path, rank: str, shape: str
) -> None:
    alone = json.loads(json.dumps(compute(folder / shape)))
    spread = computed_by(folder, rank, shape)
    assert spread["ids"] == alone["ids"]
    for what in ("logps", "scores", "next"):
        assert difference(spread[what], alone[what]) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ranks_compute_the_very_same(folder: Path, shape: str) -> None:
    """They draw without telling each other, so that not a bit may differ."""
    assert computed_by(folder, "2-0", shape) == computed_by(folder, "2-1", shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_rank_holds_its_own_heads_in_deepspeeds_layers(folder: Path, shape: str) -> None:
    alone, part = compute(folder / shape), computed_by(folder, "2-0", shape)
    assert part["layers"] == ["LinearAllreduce", "LinearLayer"]
    assert part["heads"] == [heads // 2 for heads in alone["heads"]]
    assert part["says"]["bytes"] < alone["says"]["bytes"]
    assert (part["says"]["tensor_parallel"], part["says"]["offload"]) == (2, None)


def test_offloaded_layers_keep_their_class_and_their_size_is_known(folder: Path) -> None:
    """Layers that an engine packs for the CPU could not be given to DeepSpeed."""
    alone, offloaded = compute(folder / "mha"), computed_by(folder, "cpu-0", "mha")
    assert offloaded["layers"] == ["Linear"]
    assert offloaded["says"] == alone["says"] | {"offload": "cpu"}


def backbone(config: PreTrainedConfig) -> nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("size", [3, 4])
def test_heads_that_do_not_divide_are_refused(size: int) -> None:
    model = backbone(LlamaConfig(**SMALL, num_key_value_heads=2))
    assert len(styles_of_layers(model, 2)) == 14
    with pytest.raises(ConfigError, match=f"tensor_parallel {size} must divide the 6 .* the 2 key"):
        styles_of_layers(model, size)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(Phi3Config(**SMALL, num_key_value_heads=2), id="fused-layers"),
        pytest.param(MixtralConfig(**SMALL, num_key_value_heads=2), id="experts"),
    ],
)
def test_layers_that_deepspeed_cannot_split_are_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match=r"cannot be split over ranks .* use --offload instead"):
        styles_of_layers(backbone(config), 2)


@pytest.mark.parametrize("plan", [None, {"embed_tokens": "embedding_rowwise"}])
def test_an_architecture_without_a_plan_for_its_layers_is_split_like_llama(plan) -> None:
    """transformers 5.24 gave Qwen3-VL a plan of its embeddings alone; no layer was split then."""
    config = Qwen3VLTextConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    config.base_model_tp_plan = plan
    styles = styles_of_layers(backbone(config), 2)
    assert styles["layers.1.self_attn.o_proj"] == styles["layers.0.mlp.down_proj"] == "rowwise"
    assert len(styles) == 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"tensor_parallel": 2}, "start with torchrun or deepspeed", id="no-ranks"),
        pytest.param({"offload": "nvme", "offload_path": "/tmp"}, "needs a GPU", id="nvme"),
    ],
)
def test_what_cannot_work_here_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    role = ModelRole("instruct", "no such folder", "rollouts")
    with pytest.raises(ConfigError, match=message):
        load_engine(role, ModelConfig(device="cpu", **settings), SAMPLING)


def test_one_rank_does_not_halve_its_batches_alone() -> None:
    budget = TokenBudget(max_tokens=512, max_rows=8, can_halve=False)
    with pytest.raises(ConfigError, match="--max_batch_tokens 512 or --max_rows 8"):
        budget.halve()


def raising(error: Exception) -> Callable[[], None]:
    def forward() -> None:
        raise error

    return one_for_all(forward, rank=1, size=2)


def test_a_failed_forward_is_not_tried_again() -> None:
    """A RuntimeError would be taken for a bad request, and the ranks would fall out of step."""
    with pytest.raises(ParallelError, match=r"rank 1 .* Connection closed by peer"):
        raising(RuntimeError("Connection closed by peer"))()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), UnsupportedAttentionError("s")])
def test_errors_that_have_their_own_handling_rise_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)):
        raising(error)()
