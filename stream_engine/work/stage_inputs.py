"""What shapes each stage's results: checkpoints, sampling values, the pipeline's own settings."""

from __future__ import annotations

from typing import Any

import msgspec

from stream_engine.config import STAGES, SamplingConfig, Stage, fingerprint
from stream_engine.models import checkpoint_fingerprint
from stream_engine.pipelines.base import Pipeline
from stream_engine.records import SCHEMA_VERSION
from stream_engine.run_dir.run_json import StageInputs, as_read_back


def stage_inputs(pipeline: Pipeline) -> dict[Stage, StageInputs]:
    """What shapes each stage's results under these settings.

    Raises:
        CheckpointError: when a model's folder is no checkpoint.
        ConfigError: when the models make no sense together.
    """
    config = pipeline.config
    shared: dict[str, Any] = {"dtype": config.dtype, "schema_version": SCHEMA_VERSION}
    if config.vision_tower_path:
        shared["vision_tower_path"] = checkpoint_fingerprint(config.vision_tower_path)
    known: dict[str, str] = {}
    inputs: dict[Stage, dict[str, Any]] = {stage: dict(shared) for stage in STAGES}
    for role in pipeline.roles():
        if role.path not in known:
            known[role.path] = checkpoint_fingerprint(role.path)
        inputs[role.stage][f"{role.name} checkpoint"] = known[role.path]
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
