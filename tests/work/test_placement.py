"""Placement: how models share memory is decided from their headers, and shapes no result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stream_engine.config import RunConfig
from stream_engine.demo import demo_models
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import open_run
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.placement import decide_placement, loaded_bytes, worker_memory
from stream_engine.work.stage_inputs import stage_inputs
from tests.conftest import DEMO_FLAGS, answers, parts
from tests.processes import run_rank


def config(**settings: object) -> RunConfig:
    return RunConfig(**demo_models("dpo_reward"), **settings)


def placed(memory: int, **settings: object):
    settings_ = config(**settings)
    pipeline = pipeline_class("dpo_reward")(settings_)
    return decide_placement(pipeline, settings_, memory_bytes=memory, device="cpu")


def test_bytes_are_those_of_the_loaded_dtype() -> None:
    folder = Path(demo_models("dpo_reward")["instruct_model_path"])
    single = loaded_bytes(folder, dtype="float32", device="cpu")
    assert loaded_bytes(folder, dtype="bfloat16", device="cpu") * 2 == single
    assert loaded_bytes(folder, dtype="auto", device="cpu") == single
    on_disk = (folder / "model.safetensors").stat().st_size
    assert 0.9 * on_disk <= loaded_bytes(folder, dtype="auto", device="cuda:0") <= on_disk


def test_models_that_do_not_fit_together_are_staged() -> None:
    sizes = placed(10**12).model_bytes
    assert len(sizes) == 2
    total = sum(sizes.values())
    assert placed(2 * total).together
    assert not placed(int(1.2 * total)).together
    assert placed(int(1.2 * total), placement="together").together
    assert not placed(10**12, placement="staged").together
    assert "one model at a time" in placed(10**12, placement="staged").line()


@pytest.mark.parametrize(
    ("rank", "share"),
    [
        pytest.param(Rank(local_world_size=2), 1, id="a-gpu-each"),
        pytest.param(Rank(local_world_size=8), 4, id="four-on-a-gpu"),
        pytest.param(Rank(local_world_size=8, sharing_device=2), 2, id="as-the-launcher-says"),
    ],
)
def test_ranks_that_share_a_gpu_share_its_memory(
    rank: Rank, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each had all of it to itself, and models that did not fit there together were so held."""
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worker_memory("cuda:0", rank) == (80 << 30) // share


def test_staged_engines_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    settings = config(work_dir=str(tmp_path), device="cpu", dataset_path=("none.parquet",))
    pipeline = pipeline_class("dpo_reward")(settings)
    open_run(RunDir(tmp_path), settings, stage_inputs(pipeline))
    engines = LoadedEngines(RunDir(tmp_path), pipeline, Rank(threads_set=True))
    engines.one_at_a_time = True
    stages = ("rollouts", "rewards")
    by_role = engines.get(stages, keep=stages)
    first = by_role["instruct"]
    assert by_role["instruct"] is first
    by_role["reward"]
    assert not hasattr(first, "model")  # closed
    assert by_role["instruct"] is not first
    engines.close()


@pytest.mark.parametrize("placement", ["staged", "together"])
def test_placement_shapes_no_result(
    placement: str, demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", tmp_path / "run"]
    assert run_rank([*words, "--placement", placement], log=tmp_path / "log") == 0
    text = (tmp_path / "log").read_text()
    assert ("one model at a time" if placement == "staged" else "side by side") in text
    assert answers(tmp_path / "run") == answers(demo_run)
    assert parts(tmp_path / "run/dataset") == parts(demo_run / "dataset")
