"""Models that one device cannot hold, by DeepSpeed: split over ranks, or streamed from the host.

**Split** (`tensor_parallel` N). N ranks run the same calls on the same requests. Of the language
model's linear layers, those that the architecture's own plan in transformers calls "colwise" become
DeepSpeed's `LinearLayer` (a rank keeps the rows of its own heads), those it calls "rowwise" become
`LinearAllreduce` (its columns, and a sum over the ranks). So a rank's cache holds its own heads,
while hidden states and logits are equal on all ranks; and because random numbers are functions of
seed and position, all ranks draw the same tokens without telling each other. The image encoder, the
embeddings and the head are whole on every rank. What a rank would decide alone (halving a batch
after out-of-memory) is an error here.

**Offload** ("cpu", "nvme"). ZeRO-Inference: the weights of the language model's layers lie in host
memory or on a local drive and pass through the device layer by layer, so that large batches pay.
"nvme" needs DeepSpeed's asynchronous I/O operator, and is refused where it cannot be built and on
machines without an accelerator. "cpu" also runs on the CPU, where it saves nothing.

DeepSpeed's own `init_inference` is not used: it casts rotary frequencies to 16 bits, and waits for
every rank of the run, where only a worker's ranks should wait for each other. Each worker's ranks
are a torch.distributed world of their own. Decode steps are not captured as CUDA graphs here.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stream_engine.config import ModelConfig
from stream_engine.device_errors import is_out_of_memory
from stream_engine.engine.attention_steps import UnsupportedAttentionError
from stream_engine.errors import ConfigError, ParallelError
from stream_engine.models import load_model
from stream_engine.models.base import VisionLanguageModel
from stream_engine.models.checkpoints import mapped_weights, resolve_device, resolve_dtype
from stream_engine.models.intact import read_json
from stream_engine.models.native import one_line
from stream_engine.models.weight_files import WeightFiles

SPLIT = {"colwise": "LinearLayer", "rowwise": "LinearAllreduce"}
"""Style in an architecture's plan -> DeepSpeed's layer for it."""
WHOLE = {"replicated_with_grad_allreduce", "embedding_rowwise"}
"""Styles of layers that every rank keeps whole."""
DEFAULT_PLAN = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
"""Llama's, for architectures that have its layers and state no plan for them (Qwen3-VL)."""


def load_spread(
    checkpoint: str | Path, config: ModelConfig, *, name_hint: str | None = None
) -> VisionLanguageModel:
    """Load a model whose layers are split over this worker's ranks, or offloaded.

    The weights pass through host memory: mapped from their files where the checkpoint's type is
    the one that is wanted and this package's own loaders read it, else as a copy in every rank.

    Raises:
        ConfigError: for heads or an architecture that cannot be split, or an offload that cannot
            work here.
        CheckpointError: with the file or tensor at fault.
    """
    checkpoint, device = Path(checkpoint), resolve_device(config)
    if config.offload == "nvme":
        _check_nvme(device)
    if config.tensor_parallel > 1 and not dist.is_initialized():
        raise ConfigError("tensor_parallel needs ranks: start with torchrun or deepspeed")
    stated = read_json(checkpoint / "config.json")
    dtype = resolve_dtype(config, stated, WeightFiles(checkpoint))
    name: Any = str(dtype).removeprefix("torch.")
    on_host = dataclasses.replace(config, device="cpu", dtype=name)
    with mapped_weights(device.type != "cpu"):
        model = load_model(checkpoint, on_host, name_hint=name_hint)
    if config.offload:
        offload(model, device, config.offload, config.offload_path)
    else:
        split(model, device)
    for part in vars(model).values():
        if isinstance(part, nn.Module):
            part.to(device)
    return model


# -- split -----------------------------------------------------------------------------------------


def split(model: VisionLanguageModel, device: torch.device) -> None:
    """Split the language model's layers over the ranks of this world, in place.

    Raises:
        ConfigError: when they cannot be split so.
    """
    size = dist.get_world_size()
    backbone = model.backbone
    styles = styles_of_layers(backbone, size)
    deepspeed = _deepspeed(device)
    for name, style in styles.items():
        path, _, attribute = name.rpartition(".")
        layer_class = getattr(deepspeed.module_inject.layers, SPLIT[style])
        whole = backbone.get_submodule(name)
        part = layer_class(whole, dist.group.WORLD, name=name)
        setattr(backbone.get_submodule(path), attribute, part)
    rank = dist.get_rank()
    backbone.forward = one_for_all(backbone.forward, rank=rank, size=size)  # type: ignore[assignment]
    model.tensor_parallel = size


def styles_of_layers(backbone: nn.Module, size: int) -> dict[str, str]:
    """Name of each layer to split -> "colwise" or "rowwise", for `size` ranks.

    Raises:
        ConfigError: when heads do not divide, or the architecture's plan asks for more than this.
    """
    config: Any = backbone.config
    architecture = type(backbone).__name__
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if WHOLE.issuperset(plan.values()):
        plan = DEFAULT_PLAN
    other = sorted(set(plan.values()) - WHOLE - SPLIT.keys())
    if other:
        raise ConfigError(
            f"{architecture} cannot be split over ranks ({', '.join(other)}); use --offload instead"
        )
    styles = {}
    for name, layer in backbone.named_modules():
        style = plan.get(re.sub(r"\d+", "*", name))
        if style in SPLIT and isinstance(layer, nn.Linear):
            styles[name] = style
    found = {re.sub(r"\d+", "*", name) for name in styles}
    missing = [name for name, style in plan.items() if style in SPLIT and name not in found]
    if missing:
        raise ConfigError(
            f"{architecture} cannot be split over ranks (it has no {missing[0]}); "
            "use --offload instead"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or kv_heads % size:
        raise ConfigError(
            f"tensor_parallel {size} must divide the {heads} attention heads and the {kv_heads} "
            f"key and value heads of {architecture}"
        )
    return styles


def one_for_all(forward: Callable[..., Any], *, rank: int, size: int) -> Callable[..., Any]:
    """A forward whose failure ends this rank's work, and by that every rank's.

    While one rank fails, the others wait for its part of a sum: nothing may be tried again. Out of
    memory rises as it is, for `TokenBudget` to say what to do.
    """

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except UnsupportedAttentionError:
            raise  # all ranks find this alike, in the self-test
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ParallelError(
                f"a forward over {size} ranks failed on rank {rank} of them; "
                f"the first rank to fail says why: {one_line(error)}"
            ) from error

    return run


def agreed_minimum(value: int) -> int:
    """The smallest of the ranks' values."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    smallest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


# -- offload ---------------------------------------------------------------------------------------


def offload(model: VisionLanguageModel, device: torch.device, place: str, path: str | None) -> None:
    """Hand the language model's layers to ZeRO-Inference, in place; embeddings and head stay."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed = _deepspeed(device)
    where: dict[str, Any] = {"device": place, "pin_memory": device.type != "cpu"}
    backbone: Any = model.backbone
    embedding = backbone.get_input_embeddings()
    backbone.set_input_embeddings(nn.Identity())  # it runs outside of the backbone's forward
    if place == "nvme":
        largest = max(p.numel() for p in backbone.parameters())
        where |= {"nvme_path": path, "buffer_count": 8, "buffer_size": largest}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants it, nothing reads it
        "zero_optimization": {"stage": 3, "offload_param": where},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
    }
    # First parameter by parameter: `initialize` alone would put the whole model on the device.
    deepspeed.zero.Init(module=backbone, config_dict_or_path=settings, dtype=model.dtype)
    deepspeed.initialize(model=backbone, config=settings)
    backbone.set_input_embeddings(embedding)
    backbone.eval()
    model.offload = place


def _check_nvme(device: torch.device) -> None:
    if device.type == "cpu":
        raise ConfigError("offload nvme needs a GPU; on this machine, give --offload cpu or none")
    builder = _deepspeed(device).ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible():
        raise ConfigError(
            "offload nvme needs DeepSpeed's async_io operator: install libaio-dev and a C++ "
            "compiler, or give --offload cpu"
        )


# -- DeepSpeed -------------------------------------------------------------------------------------


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, on this process's torch.distributed world where there is one."""
    if find_spec("deepspeed") is None:
        raise ConfigError("tensor_parallel and offload need the deepspeed package: install it")
    # DeepSpeed reads these when it is imported and set up.
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.module_inject.layers
    import deepspeed.ops
    import deepspeed.ops.op_builder

    # Its shared-memory sum would be compiled on first use, and mixes the workers of one host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return deepspeed
