"""Roles that may share an engine do, and none draws with another one's sampling."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from stream_engine.config import STAGES
from stream_engine.demo import demo_models
from stream_engine.pipelines.asking import Ask, ask
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import open_run
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.stage_inputs import stage_inputs


def engines_of(pipeline, folder):
    run_dir = RunDir(folder)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    open_run(run_dir, pipeline.config, stage_inputs(pipeline))
    return LoadedEngines(run_dir, pipeline, Rank(threads_set=True))


def load(pipeline, folder):
    return engines_of(pipeline, folder).get(STAGES, keep=STAGES)


def num_loads(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("loaded ") for record in caplog.records)


def test_text_roles_of_one_checkpoint_share_an_engine_and_so_do_the_others(make_pipeline, tmp_path):
    engines = load(make_pipeline("divide_and_conquer"), tmp_path)
    assert engines["split"] is engines["question_change"]
    assert engines["instruct"] is engines["auto_check"]
    assert engines["split"] is not engines["instruct"]


def test_a_critic_that_is_the_instruct_model_keeps_its_own_sampling(make_pipeline, tmp_path):
    options = {"critic_temperature": 0.25, "critic_max_new_tokens": 20}
    engines = load(make_pipeline("llava_critic", pipeline_options=options), tmp_path)
    assert engines["critic"].sampling.temperature == 0.25
    assert engines["critic"].sampling.max_new_tokens == 20
    assert engines["instruct"].sampling.temperature == 1.0
    assert engines["instruct"].sampling.max_new_tokens == 10


def test_engines_that_only_score_keep_no_room_for_answers(make_pipeline, tmp_path):
    pipelines = {name: make_pipeline(name) for name in ("dpo_reward", "llava_critic")}
    pipelines["divide_and_conquer"] = make_pipeline("divide_and_conquer")
    scoring = {(n, r.name) for n, p in pipelines.items() for r in p.roles() if not r.draws}
    assert scoring == {("dpo_reward", "reward"), ("divide_and_conquer", "auto_check")}
    engines = load(make_pipeline("dpo_reward", **demo_models("dpo_reward")), tmp_path)
    assert engines["reward"].planner.demand().rows == 0
    assert engines["instruct"].planner.demand().rows > 0


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_a_model_that_splits_asks_and_checks_is_loaded_once(
    one_at_a_time: bool, make_pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers too, here: four roles that draw in three ways, and the weights of one."""
    caplog.set_level(logging.INFO)
    loaded = engines_of(make_pipeline("divide_and_conquer"), tmp_path)
    loaded.one_at_a_time = one_at_a_time
    engines = loaded.get(STAGES, keep=STAGES)
    models = [
        engines[name].model for name in ("instruct", "split", "question_change", "auto_check")
    ]
    assert num_loads(caplog) == 1
    assert all(model is models[0] for model in models)
    loaded.close()


def test_the_weights_stay_when_the_stage_that_loaded_them_is_over(
    make_pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loaded = engines_of(make_pipeline("llava_critic"), tmp_path)
    instruct = loaded.get(("rollouts",), keep=("rollouts",))["instruct"]
    loaded.get(("rewards",), keep=("rewards",))
    assert num_loads(caplog) == 1
    assert not hasattr(instruct, "model")  # closed, and its cache with it
    loaded.close()


def test_a_model_says_the_same_whoever_has_its_weights_too(
    make_pipeline, checkpoint: Path, tmp_path: Path
) -> None:
    copies = [shutil.copytree(checkpoint, tmp_path / name) for name in ("check", "ask", "split")]
    apart = make_pipeline("divide_and_conquer", reward_model_path=",".join(map(str, copies)))
    separate = load(apart, tmp_path / "apart")
    shared = load(make_pipeline("divide_and_conquer"), tmp_path / "shared")
    assert separate["split"].model is not separate["question_change"].model
    questions = {"one": "What is it?", "other": "Is there a red circle?"}
    for name in ("split", "instruct", "question_change"):
        said = [
            list(ask(engines[name], [Ask("key", questions)], seed=3))
            for engines in (shared, separate, shared)
        ]
        assert said[0] == said[1] == said[2]
