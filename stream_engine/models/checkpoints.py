"""Published checkpoint files -> native modules: strict, memory-mapped, never a pickle payload.

    weights = WeightFiles(checkpoint)
    with empty_weights():
        model = LlamaForCausalLM(config)
    load_into(model, weights, rename, device=device, dtype=dtype)   # missing, wrong shape: an error
    weights.discard(LEGACY_BUFFERS)
    weights.check_all_used()                                        # unexpected: an error

Files are read one after the other and tensor by tensor, so that beside the model itself at most
one file's pages are resident. This module knows formats, not families: which stored name is which
parameter is the family's `rename`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models.intact import read_json
from stream_engine.models.weight_files import WeightFiles, plural, some

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Rename = Callable[[str], str | None]


class empty_weights(TorchFunctionMode):
    """Construct modules without memory for their weights.

    `torch.empty`, from which layers make their parameters, answers with a meta tensor; everything
    else (rotary frequencies, position ids ...) is computed as the constructor does, in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load_into(
    module: ModuleT,
    weights: WeightFiles,
    rename: Rename,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> ModuleT:
    """Fill `module` (made under `empty_weights`) from the files, on `device` in `dtype`.

    `rename` maps a stored name to the module's own, or to None where the tensor is not this
    module's. Tied parameters may be stored under one name or, with equal values, under each.
    Buffers keep their own dtype. Returns the module, in eval mode and without gradients.

    Raises:
        CheckpointError: naming the parameters that no file holds, or whose shape is another.
    """
    targets = {name: rename(name) for name in weights.names}
    expected = module.state_dict(keep_vars=True)
    sources = {name: t for name, t in targets.items() if t is not None and t in expected}
    _check_shapes(weights, sources, expected)
    aliases = _aliases(module)
    _check_missing(module, weights, set(sources.values()), aliases)

    filled: dict[str, nn.Parameter] = {}
    for name, tensor in weights.read(sources):
        target = sources[name]
        if target in aliases and not tensor.is_floating_point():
            raise CheckpointError(
                f"{weights.file(name)}: {name} holds {tensor.dtype}: the weights are quantised; "
                "give the folder of the unquantised checkpoint"
            )
        loaded = _place(tensor, device, dtype)
        if target not in aliases:  # a persistent buffer
            _set(module, target, loaded)
        elif target not in filled:
            parameter = nn.Parameter(loaded, requires_grad=False)
            for alias in aliases[target]:
                _set(module, alias, parameter)
                filled[alias] = parameter
        elif not torch.equal(filled[target], loaded):
            tied = len(aliases[target]) > 1
            raise CheckpointError(
                f"{weights.file(name)}: {name} differs from the tensor "
                + (
                    "it is tied to; config.json says tie_word_embeddings is true"
                    if tied
                    else f"stored elsewhere for {target}"
                )
            )
    for name, buffer in module.named_buffers():
        _set(module, name, buffer.to(device))
    left = [name for name, tensor in _all_tensors(module) if tensor.is_meta]
    assert not left, f"nothing fills {left} of {type(module).__name__}"
    return module.eval()


_SHARED: dict[Any, list[weakref.ref[nn.Module]]] = {}


def load_shared(
    key: str,
    build: Callable[[], ModuleT],
    weights: WeightFiles,
    rename: Rename,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> ModuleT:
    """Like `load_into`, but returns a module that is already loaded where its bytes are the same.

    Two models that descend from one often hold equal vision towers. `key` tells apart modules of
    different configuration; equality of the weights is checked tensor by tensor.
    """
    loaded = _SHARED.setdefault((key, device, dtype), [])
    loaded[:] = [reference for reference in loaded if reference() is not None]
    for reference in loaded:
        module = reference()
        if module is not None and _holds(module, weights, rename, device, dtype):
            return module  # type: ignore[return-value]
    with empty_weights():
        module = build()
    load_into(module, weights, rename, device=device, dtype=dtype)
    loaded.append(weakref.ref(module))
    return module


def resolve_device(config: ModelConfig) -> torch.device:
    """`config.device`, where auto is the current accelerator, or the CPU without one."""
    if config.device != "auto":
        return torch.device(config.device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def resolve_dtype(
    config: ModelConfig, checkpoint_config: dict[str, Any], weights: WeightFiles
) -> torch.dtype:
    """`config.dtype`, where auto is float32 on CPU and the checkpoint's own elsewhere."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if resolve_device(config).type == "cpu":
        return torch.float32
    stated = checkpoint_config.get("torch_dtype") or checkpoint_config.get("dtype")
    known = {
        str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)
    }
    return known.get(str(stated), weights.dtype())


def read_own_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a checkpoint whose tensors are read here, one by one, as they are stored.

    Raises:
        CheckpointError: when it cannot be read, or the tensors are quantised.
    """
    stated = read_json(checkpoint / "config.json")
    if quantized := stated.get("quantization_config"):
        is_told = isinstance(quantized, dict)
        method = quantized.get("quant_method", "unnamed") if is_told else quantized
        raise CheckpointError(
            f"{checkpoint / 'config.json'}: the weights are quantised (quant_method "
            f"{method}), which is not supported for this format; "
            f"give the folder of the unquantised checkpoint"
        )
    return stated


def _check_shapes(
    weights: WeightFiles, sources: dict[str, str], expected: dict[str, Tensor]
) -> None:
    wrong = [n for n, target in sources.items() if weights.shape(n) != expected[target].shape]
    if wrong:
        name = wrong[0]
        needed = tuple(expected[sources[name]].shape)
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise CheckpointError(
            f"{weights.file(name)}: {name} has shape {weights.shape(name)}, "
            f"config.json needs {needed}{more}"
        )


def _check_missing(
    module: nn.Module, weights: WeightFiles, found: set[str], aliases: dict[str, list[str]]
) -> None:
    missing = [
        name
        for name in module.state_dict(keep_vars=True)
        if not any(alias in found for alias in aliases.get(name, [name]))
    ]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; config.json says tie_word_embeddings is false, so the head must be there"
        raise CheckpointError(
            f"{weights.checkpoint} lacks {len(missing)} {plural('tensor', missing)} of "
            f"{type(module).__name__}: {some(missing)}{hint}"
        )


def _holds(
    module: nn.Module,
    weights: WeightFiles,
    rename: Rename,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    expected = module.state_dict()
    targets = {name: rename(name) for name in weights.names}
    sources = {name: t for name, t in targets.items() if t is not None and t in expected}
    if set(sources.values()) != set(expected):
        return False
    if any(weights.shape(n) != expected[t].shape for n, t in sources.items()):
        return False
    tensors = weights.read(sources)

    def equal(tensor: Tensor, held: Tensor) -> bool:
        dense = held.to_dense() if held.is_mkldnn else held  # an engine packs CPU weights
        return torch.equal(_place(tensor, dense.device, dtype), dense)

    return all(equal(tensor, expected[sources[name]]) for name, tensor in tensors)


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> every name of the same parameter, its own included."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _place(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A contiguous copy that does not keep the file mapped, unless `mapped_weights` asks for it."""
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    placed = tensor.to(device).to(wanted).contiguous()
    is_view = placed.data_ptr() == tensor.data_ptr()
    return placed.clone() if is_view and not _keep_mapped.get() else placed


_keep_mapped: ContextVar[bool] = ContextVar("keep_mapped", default=False)


@contextmanager
def mapped_weights(keep: bool = True) -> Iterator[None]:
    """Inside, weights loaded to the CPU in their stored type stay pages of their files.

    For models that are about to move elsewhere, part by part: they take no host memory.
    """
    token = _keep_mapped.set(keep)
    try:
        yield
    finally:
        _keep_mapped.reset(token)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    table: Any = owner._parameters if attribute in owner._parameters else owner._buffers
    table[attribute] = tensor


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
