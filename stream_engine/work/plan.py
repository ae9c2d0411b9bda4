"""What a run will do, before it does it: models, stages, what is done and what must go."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from stream_engine.config import STAGES, ModelRole, RunConfig, SamplingConfig
from stream_engine.engine.host_memory import host_available
from stream_engine.errors import CheckpointError, ConfigError
from stream_engine.models import detect_family, read_checkpoint_config
from stream_engine.models.hub import with_checkpoints
from stream_engine.outputs.formats import check_formats
from stream_engine.pipelines import pipeline_class
from stream_engine.pipelines.base import Pipeline
from stream_engine.ranks import Rank, planned_device
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.refusals import (
    DEMO_DATASET,
    refuse_foreign,
    refuse_no_input,
    refuse_unwritable,
)
from stream_engine.run_dir.run_json import changed_inputs, has_results, read_run_file
from stream_engine.run_dir.state import RunState
from stream_engine.servers import served
from stream_engine.store import files
from stream_engine.store.locations import canonical_source
from stream_engine.work.loaded_engines import EngineKey, engine_key
from stream_engine.work.other_python import find_python
from stream_engine.work.placement import (
    ITEM_BYTES,
    Placement,
    decide_placement,
    human_bytes,
    local_roles,
    worker_memory,
)
from stream_engine.work.stage_inputs import check_inputs, stage_inputs

if TYPE_CHECKING:
    from stream_engine.engine.memory import Demand, LanguageShape
    from stream_engine.engine.sampling import ResolvedSampling

PICTURE_PROMPT_TOKENS, TEXT_PROMPT_TOKENS = 640, 256
"""A typical prompt, which only a loaded model can measure: LLaVA-1.5's is 576 image tokens."""
TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Where a config.json keeps the language model's sizes, when it does not state them itself."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def plan_lines(config: RunConfig) -> Iterator[str]:
    """The plan of a run in lines. Checks every setting and path that a run would check first.

    Raises:
        ConfigError, CheckpointError: as the run itself would.
    """
    pipeline = pipeline_class(config.pipeline_name)(with_checkpoints(config))
    run_dir = RunDir(config.work_dir)
    refuse_foreign(run_dir)
    refuse_unwritable(run_dir)
    check_formats(config)
    inputs = stage_inputs(pipeline)
    refuse_no_input(run_dir, config)
    demo = canonical_source(str(run_dir.root / DEMO_DATASET))  # yet to be made
    check_inputs(config, known={demo})
    elsewhere = find_python(config.reward_model_python_path) is not None
    for role in local_roles(pipeline):
        if not (elsewhere and role.stage == "rewards"):  # there it may be of a family of its own
            detect_family(role.path, name_hint=role.hint)
    yield f"pipeline  {pipeline.name}, {config.sample_k} answers a question, seed {config.seed}"
    rank = Rank.from_environment()
    device = planned_device(rank, config.device)
    memory = worker_memory(device, rank, offload=config.offload)
    placement = decide_placement(pipeline, config, memory_bytes=memory, device=device)
    for role in local_roles(pipeline):
        size = human_bytes(placement.model_bytes[role.path])
        yield f"model     {role.name}: {role.path} ({size} as loaded) for {role.stage}"
    yield from server_lines(pipeline, config)
    yield from sampling_lines(pipeline, config)
    spread = (
        f", each model over {config.tensor_parallel} ranks" if config.tensor_parallel > 1 else ""
    )
    spread += f", weights from {config.offload_path or config.offload}" if config.offload else ""
    yield f"device    {device}{spread}"
    yield f"placement {placement.line()}"
    yield from batch_lines(pipeline, config, placement, device=device, rank=rank)
    yield f"input     {', '.join(config.dataset_path) or 'what the run already has'}"
    yield f"work_dir  {config.work_dir}"
    if not files.exists(run_dir.run_json):
        yield "state     new"
        return
    run_file = read_run_file(run_dir)
    changes = changed_inputs(run_file.stages, inputs)
    stale = [s for s in STAGES if run_file.stages[s].fingerprint != inputs[s].fingerprint]
    if changes:
        first = run_file.first_shard
        held = [stage for stage in stale if has_results(run_dir, stage, first)]
        what = (
            f"results of {', '.join(held)} must be discarded" if held else "no result is affected"
        )
        yield f"changed   {', '.join(changes)}: {what}"
    fingerprints = msgspec.structs.replace(run_file, stages=inputs).fingerprints
    state = RunState(run_dir, fingerprints, max_shard_retries=config.max_shard_retries).refresh()
    for stage in STAGES:
        done = sum(state.is_complete(stage, shard) for shard in state.shards)
        yield f"state     {stage}: {done} of {len(state.shards)} shards done"


def server_lines(pipeline: Pipeline, config: RunConfig) -> Iterator[str]:
    """The models on servers, with what they are asked to sample by; nothing is asked for this."""
    for role in pipeline.roles():
        if (address := served(role.path)) is not None:
            given = msgspec.to_builtins(role.sampling or config.part(SamplingConfig))
            values = ", ".join(
                f"{name} {given[name]:g}" if given[name] is not None else f"{name} the server's"
                for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            )
            yield (
                f"server    {role.name}: {address.name} at {address.url} for {role.stage}, "
                f"{config.server_requests} requests at once; {values}"
            )


def sampling_lines(pipeline: Pipeline, config: RunConfig) -> Iterator[str]:
    """How each role that draws will, where every value comes from, and what is not followed."""
    for role in local_roles(pipeline):
        if role.draws:
            sampling = _resolved(role, config)
            values = (
                f"{name} {getattr(sampling, name):g} ({source})"
                for name, source in sampling.sources.items()
            )
            yield f"sampling  {role.name}: {', '.join(values)}"
            yield from (f"sampling  {role.name}: {note}" for note in sampling.notes)


def batch_lines(
    pipeline: Pipeline, config: RunConfig, placement: Placement, *, device: str, rank: Rank
) -> Iterator[str]:
    """The largest batch that fits for each engine, from config.json and free memory alone."""
    from stream_engine.engine.memory import plan_memory, share_out, wanted_bytes

    sharing: dict[EngineKey, list[ModelRole]] = {}
    for role in local_roles(pipeline):
        sharing.setdefault(engine_key(role), []).append(role)
    sizes = placement.model_bytes
    weights = {path: 0 if config.offload else size for path, size in sizes.items()}
    free = _free_bytes(device, rank)
    demands: dict[EngineKey, Demand] = {}
    unknown: dict[EngineKey, str] = {}
    for key, roles in sharing.items():
        try:
            demands[key] = _demand(roles[0], config, device=device)
        except (ConfigError, CheckpointError) as error:
            unknown[key] = f"known once the model is loaded ({error})"
    wants = [wanted_bytes(demand) for demand in demands.values()]
    parts = dict(zip(demands, share_out(max(0, free - sum(weights.values())), wants)))
    for key, roles in sharing.items():
        if key in unknown:
            line = unknown[key]
        else:
            own = weights[roles[0].path]
            part = parts[key] if placement.together else max(0, free - own)
            try:
                line = plan_memory(demands[key], part, weights=own).line()
            except ConfigError as error:
                line = f"does not fit: {error}"
        yield f"batch     {', '.join(role.name for role in roles)}: {line}"
    yield (
        f"batch     of {human_bytes(free)} free; computed, confirmed when the run loads the models"
    )


def _free_bytes(device: str, rank: Rank) -> int:
    if device == "cpu":
        return host_available(share=rank.local_world_size)
    import torch

    from stream_engine.engine.planner import free_bytes

    return free_bytes(torch.device(device), rank)


def _demand(role: ModelRole, config: RunConfig, *, device: str) -> Demand:
    """What the role's engine will ask of memory, as far as files tell."""
    from stream_engine.engine.memory import (
        DEFAULT_ROWS,
        DEFAULT_TOKENS,
        PENALTY_COPIES,
        STEPS_PER_READ,
        Demand,
        rows_per_question,
    )

    kind = "cpu" if device == "cpu" else "cuda"
    answers = _resolved(role, config)
    penalty = answers.repetition_penalty
    shape = read_shape(
        Path(role.path), dtype=config.dtype, device=device, parts=config.tensor_parallel
    )
    stated = read_checkpoint_config(Path(role.path))
    sees = any("vision" in name for name in stated)
    captured = kind == "cuda" and not config.offload and config.tensor_parallel == 1
    return Demand(
        shape=shape,
        kv_bytes=shape.kv_bytes,
        rows=(config.max_rows or DEFAULT_ROWS[kind]) if role.draws else 0,
        tokens=config.max_batch_tokens or DEFAULT_TOKENS[kind],
        slot_tokens=answers.max_new_tokens + STEPS_PER_READ,
        prompt_tokens=PICTURE_PROMPT_TOKENS if sees else TEXT_PROMPT_TOKENS,
        rows_per_question=rows_per_question(role, config.part(SamplingConfig)),
        logit_copies=1.0 + (PENALTY_COPIES if penalty != 1.0 else 0.0),
        device=kind,
        grows=kind == "cpu",
        graphs=captured,
    )


def _resolved(role: ModelRole, config: RunConfig) -> ResolvedSampling:
    """A role's sampling as its engine will resolve it."""
    from stream_engine.engine.sampling import resolve_sampling
    from stream_engine.models.intact import read_json

    defaults = read_json(Path(role.path) / "generation_config.json")
    return resolve_sampling(role.sampling or config.part(SamplingConfig), defaults)


def read_shape(checkpoint: Path, *, dtype: str, device: str, parts: int = 1) -> LanguageShape:
    """Sizes of a checkpoint's language model from its config.json, for any family.

    The original formats state them at the top; native ones in a part, of which transformers fills
    in what is left at its default.

    Raises:
        CheckpointError: for a config.json that cannot be read.
        ConfigError: when it does not state the sizes.
    """
    from stream_engine.engine.memory import language_shape

    stated = read_checkpoint_config(checkpoint)
    text: Any = stated
    for name in TEXT_PARTS:
        if isinstance(stated.get(name), dict):
            text = stated[name]
    if all(name in text for name in SIZES):
        config: Any = types.SimpleNamespace(**text)
    else:
        config = _native_text_config(checkpoint)
    names = ("dtype", "torch_dtype")
    kept = [str(part[name]) for part in (text, stated) for name in names if part.get(name)]
    kind = dtype if dtype != "auto" else "float32" if device == "cpu" else kept[0] if kept else ""
    shape = language_shape(config, itemsize=ITEM_BYTES.get(kind, 4), parts=parts)
    if not (shape.layers and shape.hidden and shape.vocab):
        raise ConfigError(f"{checkpoint}: config.json does not state the language model's sizes")
    return shape


def _native_text_config(checkpoint: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{checkpoint}: config.json is of no known architecture") from error
    return config.get_text_config()
