"""What shapes each stage's results: checkpoints, sampling values, the pipeline's own settings; and
whether the inputs can be read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import msgspec

from stream_engine.config import STAGES, RunConfig, SamplingConfig, Stage, fingerprint
from stream_engine.errors import ConfigError
from stream_engine.inputs.sources import list_inputs
from stream_engine.models import checkpoint_fingerprint
from stream_engine.pipelines.base import SAMPLER, Pipeline
from stream_engine.records import SCHEMA_VERSION
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rounds import StageInputs
from stream_engine.run_dir.run_json import as_read_back, kept_settings, read_with_version
from stream_engine.servers import PREFIX, served
from stream_engine.store.locations import canonical_source

MODEL_SETTINGS = (
    *("pipeline_name", "instruct_model_path", "reward_model_path", "base_model_path"),
    *("vision_tower_path", "sampler"),
)


def stage_inputs(
    pipeline: Pipeline, kept: Mapping[Stage, StageInputs] | None = None
) -> dict[Stage, StageInputs]:
    """What shapes each stage's results under these settings.

    Args:
        kept: what a run has kept of these same models, for those that are not on this machine.

    Raises:
        CheckpointError: when a model's folder is no checkpoint.
        ConfigError: when the models make no sense together.
    """
    config = pipeline.config
    if config.sampler and not any(role.name == SAMPLER for role in pipeline.roles()):
        raise ConfigError(f"{pipeline.name} draws its answers in its own way: it has no --sampler")
    if config.base_model_path and not pipeline.has_base:
        raise ConfigError(f"{pipeline.name} scores without a base model: no --base_model_path")
    shared: dict[str, Any] = {"dtype": config.dtype, "schema_version": SCHEMA_VERSION}
    before = {name: said for one in (kept or {}).values() for name, said in one.inputs.items()}
    known: dict[str, str] = {}
    if config.vision_tower_path:
        name = "vision_tower_path"
        shared[name] = model_fingerprint(config.vision_tower_path, before.get(name))
    inputs: dict[Stage, dict[str, Any]] = {stage: dict(shared) for stage in STAGES}
    for role in pipeline.roles():
        name = f"{role.name} checkpoint"
        if role.path not in known:
            known[role.path] = model_fingerprint(role.path, before.get(name))
        inputs[role.stage][name] = known[role.path]
    pipeline.check_models({role.name: known[role.path] for role in pipeline.roles()})
    inputs["rollouts"] |= msgspec.to_builtins(config.part(SamplingConfig))
    inputs["rewards"]["pipeline_name"] = pipeline.name
    for stage in STAGES:
        inputs[stage] |= pipeline.settings(stage)
    inputs["rewards"]["rollouts"] = fingerprint(inputs["rollouts"])
    return {
        stage: StageInputs(fingerprint=fingerprint(values), inputs=as_read_back(values))
        for stage, values in inputs.items()
    }


def check_inputs(config: RunConfig, *, known: Container[str]) -> None:
    """Raise ConfigError for an input that the run could not read, but for those that are known."""
    if config.run_stage in (None, 0):
        for source in config.dataset_path:
            if canonical_source(source) not in known:
                list_inputs(source)


def model_fingerprint(path: str, before: str | None = None) -> str:
    """What stands for a model among the inputs; of one on a server its name, wherever it runs.

    `before` is what stood for it, where that will do when it is not here.
    """
    on_server = served(path)
    if on_server is not None:
        return f"{PREFIX}{on_server.name}"
    if before and not Path(path).exists():
        return before
    return checkpoint_fingerprint(path)


def kept_models(config: RunConfig) -> dict[Stage, StageInputs] | None:
    """What a run has kept of its models, if these settings name the same; for what runs none.

    Pairs are built and shards put back where the models may never have been.
    """
    run_file, _ = read_with_version(RunDir(config.work_dir))
    settings = kept_settings(config)
    if run_file is None or any(
        settings[name] != run_file.settings.get(name) for name in MODEL_SETTINGS
    ):
        return None
    return run_file.stages
