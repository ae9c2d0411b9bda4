"""Roles that may share an engine do, and none draws with another one's sampling."""

from __future__ import annotations

from stream_engine.config import STAGES
from stream_engine.demo import demo_models
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import open_run
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.stage_inputs import stage_inputs


def load(pipeline, folder):
    run_dir = RunDir(folder)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    open_run(run_dir, pipeline.config, stage_inputs(pipeline))
    return LoadedEngines(run_dir, pipeline, Rank(threads_set=True)).get(STAGES, keep=STAGES)


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
