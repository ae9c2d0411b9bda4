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

import json
import re
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Rename = Callable[[str], str | None]

LEGACY_BUFFERS = r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$"
"""Buffers that old transformers stored; every constructor computes them."""

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class WeightFiles:
    """The tensors of a checkpoint directory, and which of them have been used.

    Finds `model.safetensors`, `pytorch_model.bin` or the sharded form of either (safetensors
    first), and reads every file's table of contents.

    Raises:
        CheckpointError: for no weights, a missing shard, a truncated file, or a .bin that holds
            anything but tensors.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = Path(checkpoint)
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._used: set[str] = set()
        index = _find_files(self.checkpoint)
        for file, indexed_names in index.items():
            shapes = _table_of_contents(file)
            lacking = [name for name in indexed_names if name not in shapes]
            if lacking:
                raise CheckpointError(
                    f"{file} lacks {_some(lacking)}, which the index places there"
                )
            for name, shape in shapes.items():
                self._file_of[name] = file
                self._shape_of[name] = shape

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape_of[name]

    def file(self, name: str) -> Path:
        return self._file_of[name]

    def get(self, name: str) -> Tensor:
        """One tensor on the host, as stored; counts as used."""
        return next(tensor.clone() for _, tensor in self.read([name]))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file; each is valid until the next one is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        for file, wanted in by_file.items():
            for name, tensor in _tensors(file, wanted):
                self._used.add(name)
                yield name, tensor

    def discard(self, pattern: str) -> None:
        """Count as used, unread, every name in which the regular expression is found."""
        self._used.update(name for name in self._file_of if re.search(pattern, name))

    def unused(self) -> list[str]:
        return [name for name in self._file_of if name not in self._used]

    def check_all_used(self) -> None:
        """Raises CheckpointError naming the tensors that belong to no part of the model."""
        if unused := self.unused():
            raise CheckpointError(
                f"{self._file_of[unused[0]]} holds {len(unused)} unexpected "
                f"{_plural('tensor', unused)}: {_some(unused)}"
            )

    def dtype(self) -> torch.dtype:
        """The floating-point type of the largest stored tensor."""
        largest = max(self._file_of, key=lambda name: torch.Size(self._shape_of[name]).numel())
        return next(tensor.dtype for _, tensor in _tensors(self._file_of[largest], [largest]))


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


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file of a checkpoint as a dict; {} where there is none.

    Raises:
        CheckpointError: when it cannot be read as JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_own_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a checkpoint whose tensors are read here, one by one, as they are stored.

    Raises:
        CheckpointError: when it cannot be read, or the tensors are quantised.
    """
    stated = read_json(checkpoint / "config.json")
    if quantized := stated.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint / 'config.json'}: the weights are quantised (quant_method "
            f"{quantized.get('quant_method', 'unnamed')}), which is not supported for this format; "
            f"give the folder of the unquantised checkpoint"
        )
    return stated


def _find_files(checkpoint: Path) -> dict[Path, list[str]]:
    """Weight file -> the names that an index places in it (none without an index)."""
    for index_name, single_name in zip(INDEX_FILES, SINGLE_FILES):
        if (checkpoint / single_name).is_file():
            return {checkpoint / single_name: []}
        index = checkpoint / index_name
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map; download it again")
            files: dict[Path, list[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(checkpoint / file, []).append(name)
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{index} names {len(files)} files, of which {_some(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} missing; download the rest"
                )
            return files
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory; give a downloaded checkpoint's")
    raise CheckpointError(
        f"{checkpoint} has no weights: none of {', '.join(INDEX_FILES + SINGLE_FILES)} is there"
    )


def _table_of_contents(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in _names(handle)}
    return {name: tuple(tensor.shape) for name, tensor in _load_bin(file).items()}


def _tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as handle:
            for name in names:
                yield name, handle.get_tensor(name)
    else:
        tensors = _load_bin(file)
        for name in names:
            yield name, tensors[name]


def _names(handle: Any) -> list[str]:
    return list(handle.keys())


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({_one_line(error)}); download it again"
        ) from error


def _load_bin(file: Path) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(file)
    with file.open("rb") as stream:
        if not is_zip and stream.read(2) == b"PK":  # a zip's table of contents stands at its end
            raise CheckpointError(f"{file} is truncated; download it again")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{file} holds pickled Python objects beside tensors{what}; it is not loaded, since "
            f"that can run code: convert it to safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a PyTorch file ({_one_line(error)}); download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(
            f"{file} does not hold a plain table of tensors; give the model's own"
        )
    return tensors


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
            f"{weights.checkpoint} lacks {len(missing)} {_plural('tensor', missing)} of "
            f"{type(module).__name__}: {_some(missing)}{hint}"
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


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _plural(noun: str, items: list[str]) -> str:
    return noun if len(items) == 1 else f"{noun}s"


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
