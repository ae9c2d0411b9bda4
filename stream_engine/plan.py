"""What a run will do, before it does it: models, stages, what is done and what must go."""

from __future__ import annotations

from collections.abc import Iterator

from stream_engine.config import RunConfig
from stream_engine.pipelines import pipeline_class
from stream_engine.pipelines.base import STAGES
from stream_engine.placement import decide_placement, human_bytes, worker_memory
from stream_engine.ranks import Rank, set_device
from stream_engine.run_json import (
    changed_inputs,
    has_results,
    read_run_file,
    refuse_foreign,
    stage_inputs,
)
from stream_engine.run_state import RunState
from stream_engine.storage.run_dir import RunDir


def plan_lines(config: RunConfig) -> Iterator[str]:
    """The plan of a run in lines. Checks every setting and path that a run would check first.

    Raises:
        ConfigError, CheckpointError: as the run itself would.
    """
    pipeline = pipeline_class(config.pipeline_name)(config)
    run_dir = RunDir(config.work_dir)
    refuse_foreign(run_dir)
    inputs = stage_inputs(pipeline)
    yield f"pipeline  {pipeline.name}, {config.sample_k} answers a question, seed {config.seed}"
    rank = Rank.from_environment()
    device = set_device(rank, config.device)
    memory = worker_memory(device, local_workers=rank.local_world_size, offload=config.offload)
    placement = decide_placement(pipeline, config, memory_bytes=memory, device=device)
    for role in pipeline.roles():
        size = human_bytes(placement.model_bytes[role.path])
        yield f"model     {role.name}: {role.path} ({size} as loaded) for {role.stage}"
    spread = (
        f", each model over {config.tensor_parallel} ranks" if config.tensor_parallel > 1 else ""
    )
    spread += f", weights from {config.offload_path or config.offload}" if config.offload else ""
    yield f"device    {device}{spread}"
    yield f"placement {placement.line()}"
    yield f"input     {', '.join(config.dataset_path) or 'what the run already has'}"
    yield f"work_dir  {config.work_dir}"
    if not run_dir.run_json.exists():
        yield "state     new"
        return
    run_file = read_run_file(run_dir)
    changes = changed_inputs(run_file, inputs)
    stale = [s for s in STAGES if run_file.stages[s].fingerprint != inputs[s].fingerprint]
    if changes:
        held = [stage for stage in stale if has_results(run_dir, stage)]
        what = (
            f"results of {', '.join(held)} must be discarded" if held else "no result is affected"
        )
        yield f"changed   {', '.join(changes)}: {what}"
    fingerprints = {stage: inputs[stage].fingerprint for stage in STAGES}
    state = RunState(run_dir, fingerprints, max_shard_retries=config.max_shard_retries).refresh()
    for stage in STAGES:
        done = sum(state.is_complete(stage, shard) for shard in state.shards)
        yield f"state     {stage}: {done} of {len(state.shards)} shards done"
