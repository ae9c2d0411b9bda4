"""`stream-engine plan`: the batch that fits, from config.json and free memory alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from stream_engine.config import ModelConfig, RunConfig
from stream_engine.demo import demo_models
from stream_engine.engine import planner
from stream_engine.errors import StreamEngineError
from stream_engine.models import detect_family, load_model
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.refusals import DEMO_DATASET
from stream_engine.run_dir.run_json import open_run
from stream_engine.work import plan
from stream_engine.work.loaded_engines import LoadedEngines
from stream_engine.work.plan import plan_lines, read_shape
from stream_engine.work.stage_inputs import stage_inputs
from tests.models import (
    writers_hf,
    writers_llava,
    writers_llava_onevision,
    writers_minicpm_v,
    writers_omnilmm,
)

STAGES = ("rollouts", "rewards")


def config(work_dir: Path, pipeline: str = "dpo_reward", **settings: object) -> RunConfig:
    return RunConfig(
        pipeline_name=pipeline,
        work_dir=str(work_dir),
        dataset_path=(str(work_dir / DEMO_DATASET),),
        device="cpu",
        **demo_models(pipeline),
        **settings,
    )


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    for module in (plan, planner):
        monkeypatch.setattr(module, "host_available", lambda share: num_bytes)


def batch_lines(settings: RunConfig) -> list[str]:
    return [line[10:] for line in plan_lines(settings) if line.startswith("batch ")]


def llava_original(folder: Path) -> None:
    writers_llava.write_original(folder, writers_llava.random_weights(writers_llava.Shape()))


def llava_native(folder: Path) -> None:
    writers_llava.write_hf(folder, writers_llava.random_weights(writers_llava.Shape()))


def llava_onevision(folder: Path) -> None:
    shape = writers_llava_onevision.Shape()
    writers_llava_onevision.write(folder, shape, writers_llava_onevision.random_weights(shape))


def omnilmm(folder: Path) -> None:
    shape = writers_omnilmm.Shape()
    writers_omnilmm.write(folder, shape, writers_omnilmm.random_weights(shape))


def minicpm_v(folder: Path) -> None:
    shape = writers_minicpm_v.shape("2.6")
    writers_minicpm_v.write(folder, shape, writers_minicpm_v.random_weights(shape))


def qwen(folder: Path) -> None:
    writers_hf.write_hf(folder, "qwen2_5_vl")


@pytest.mark.parametrize(
    "write", [llava_original, llava_native, llava_onevision, omnilmm, minicpm_v, qwen]
)
def test_sizes_read_from_files_are_the_loaded_models(write, tmp_path: Path) -> None:
    write(tmp_path / "model")
    shape = read_shape(tmp_path / "model", dtype="float32", device="cpu")
    model = load_model(tmp_path / "model", ModelConfig(device="cpu", dtype="float32"))
    loaded = model.backbone.config
    assert shape.layers == loaded.num_hidden_layers
    assert shape.hidden == model.lm_head.weight.shape[1]
    assert shape.heads == loaded.num_attention_heads
    assert shape.kv_heads == loaded.num_key_value_heads
    assert shape.intermediate == loaded.intermediate_size


def test_sizes_that_a_native_config_leaves_out_are_its_architectures(tmp_path: Path) -> None:
    """llava-1.5-7b-hf's own text_config: all sizes are Llama's defaults, those of the 7B."""
    stated = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
        "vision_config": {"model_type": "clip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    shape = read_shape(tmp_path, dtype="auto", device="cuda")
    assert shape.kv_bytes == 512 << 10
    assert (shape.hidden, shape.intermediate, shape.vocab) == (4096, 11008, 32064)
    assert read_shape(tmp_path, dtype="auto", device="cpu").kv_bytes == 1 << 20
    assert read_shape(tmp_path, dtype="auto", device="cuda", parts=4).kv_bytes == 128 << 10


def test_the_plan_says_what_batch_fits(tmp_path: Path) -> None:
    instruct, reward, last = batch_lines(config(tmp_path, max_rows=48, max_new_tokens=24))
    assert re.match(
        r"instruct: 48 rows x 32 tokens \([\d.]+ MB\), prefixes \d+ tokens \([\d.]+ MB\), "
        r"activations [\d.]+ MB: [\d.]+ MB of its [\d.]+ [MG]B; limited by max_rows$",
        instruct,
    )
    assert re.match(r"reward: scores 4096 tokens at once, prefixes \d+ tokens", reward)
    assert last.endswith("free; computed, confirmed when the run loads the models")


def test_the_plan_says_how_answers_are_drawn_and_what_is_not_inherited(tmp_path: Path) -> None:
    settings = config(tmp_path / "run")
    instruct = tmp_path / "instruct"
    shutil.copytree(settings.instruct_model_path, instruct)
    path = instruct / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 1}))
    settings = dataclasses.replace(settings, instruct_model_path=str(instruct))
    lines = [line[10:] for line in plan_lines(settings) if line.startswith("sampling ")]
    values, note = lines  # of the instruct model alone: the reward model draws nothing
    assert values.startswith("instruct: temperature 0.7 (run), ")
    assert "top_k 50 (default (the checkpoint's top_k 1 is greedy))" in values
    assert note.startswith("instruct: generation_config.json describes greedy decoding (top_k 1)")


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        pytest.param("llava", None, id="family"),
        pytest.param("llava-v1.5-7b", None, id="published-name"),
        pytest.param("LLaVA_v1.5", None, id="other-spelling"),
        pytest.param("minicpm_v", "promises minicpm_v", id="other-family"),
        pytest.param("text_lm", "promises text_lm", id="text"),
        pytest.param("Qwen2.5-VL-7B", "promises hf_vlm", id="native-model"),
        pytest.param("MiniCPM-Llama3-V-2_5", "promises minicpm_v", id="longest-word"),
        pytest.param("qwen", "unknown model name 'qwen'.*llava-v1.5", id="unknown"),
    ],
)
def test_a_model_name_that_does_not_fit_the_checkpoint_is_refused(
    hint: str, message: str | None, tmp_path: Path
) -> None:
    """Names were compared with a few words only: most contradictions passed, as did any name."""
    settings = config(tmp_path, instruct_model_name=hint)
    if message is None:
        assert list(plan_lines(settings))
        return
    with pytest.raises(StreamEngineError, match=message):
        list(plan_lines(settings))


def test_a_native_checkpoint_is_named_by_its_model_type(tmp_path: Path) -> None:
    writers_hf.write_hf(tmp_path, "aya_vision")
    assert detect_family(tmp_path, name_hint="aya-vision-8b") == "hf_vlm"


def test_every_engine_of_a_pipeline_has_a_line(tmp_path: Path) -> None:
    names = [line.split(":")[0] for line in batch_lines(config(tmp_path, "divide_and_conquer"))]
    assert names[:-1] == ["instruct", "split, question_change", "auto_check"]


def test_less_memory_plans_fewer_rows_or_says_that_nothing_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(megabytes: int) -> int:
        free(monkeypatch, megabytes * 10**6)
        return int(re.findall(r"(\d+) rows", batch_lines(config(tmp_path))[0])[0])

    assert 1 <= rows(60) < rows(100) <= rows(100_000) == 160
    free(monkeypatch, 6_000_000)
    assert "does not fit" in batch_lines(config(tmp_path))[0]


@pytest.mark.parametrize(("placement", "times"), [("together", 1), ("staged", 2)])
def test_models_side_by_side_share_what_is_free(
    placement: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 400_000_000)
    *lines, last = batch_lines(config(tmp_path, placement=placement))
    shares = [float(re.findall(r"of its ([\d.]+) MB", line)[0]) for line in lines]
    assert sum(shares) == pytest.approx(400 * times, rel=0.02)
    assert "of 400.0 MB free" in last


@pytest.mark.parametrize("placement", ["together", "staged"])
def test_run_json_keeps_the_confirmed_plans(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = 150_000_000
    free(monkeypatch, num_bytes)
    settings = config(tmp_path, max_new_tokens=200)
    pipeline = pipeline_class("dpo_reward")(settings)
    open_run(RunDir(tmp_path), settings, stage_inputs(pipeline))
    engines = LoadedEngines(RunDir(tmp_path), pipeline, Rank(threads_set=True))
    engines.one_at_a_time = placement == "staged"
    by_role = engines.get(STAGES, keep=STAGES)
    if placement == "staged":
        for name in by_role:
            by_role[name]
    engines.close()
    said = json.loads((tmp_path / "run.json").read_text())["engines"]
    plans = {name: said[name]["memory"] for name in ("instruct", "reward")}
    assert all(plan["confirmed"] for plan in plans.values())
    assert plans["instruct"]["rows"] == said["instruct"]["max_rows"]
    assert plans["instruct"]["rows_per_question"] == 10
    assert plans["reward"]["rows"] == 0
    shares = [plan["available"] for plan in plans.values()]
    if placement == "together":
        assert sum(shares) <= num_bytes
    else:
        assert shares == [num_bytes, num_bytes]


def test_a_reward_model_for_another_python_need_not_be_known_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan`, which the launch scripts run first, refused what the run itself would have done."""
    settings = config(tmp_path / "run")
    reward = tmp_path / "reward"
    shutil.copytree(settings.reward_model_path, reward)
    stated = json.loads((reward / "config.json").read_text())
    changed = {"model_type": "acme", "architectures": ["AcmeForCausalLM"]}
    (reward / "config.json").write_text(json.dumps(stated | changed))
    settings = dataclasses.replace(settings, reward_model_path=str(reward))
    with pytest.raises(StreamEngineError, match="Acme"):
        list(plan_lines(settings))
    monkeypatch.setattr("stream_engine.work.plan.find_python", lambda setting: Path(sys.executable))
    assert any(line.startswith("model     reward: ") for line in plan_lines(settings))
