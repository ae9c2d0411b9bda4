"""The weight files of a checkpoint, safetensors or pickled tensors, as one table of named tensors.

Knows no model.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stream_engine.errors import CheckpointError
from stream_engine.models.intact import read_json

LEGACY_BUFFERS = r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$"
"""Buffers that old transformers stored; every constructor computes them."""

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")

OTHER_WEIGHTS = frozenset((".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".msgpack"))


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
                raise CheckpointError(f"{file} lacks {some(lacking)}, which the index places there")
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
                f"{plural('tensor', unused)}: {some(unused)}"
            )

    def dtype(self) -> torch.dtype:
        """The floating-point type of the largest stored tensor."""
        largest = max(self._file_of, key=lambda name: torch.Size(self._shape_of[name]).numel())
        return next(tensor.dtype for _, tensor in _tensors(self._file_of[largest], [largest]))


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
                    f"{index} names {len(files)} files, of which {some(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} missing; download the rest"
                )
            return files
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory; give a downloaded checkpoint's")
    raise CheckpointError(
        f"{checkpoint} has no weights: none of {', '.join(INDEX_FILES + SINGLE_FILES)} is there"
        + _others(checkpoint)
    )


def _others(checkpoint: Path) -> str:
    """What a folder without known weights holds in their place, and what helps."""
    names = sorted(p.name for p in checkpoint.iterdir() if p.suffix in OTHER_WEIGHTS)
    if not names:
        return ""
    of_index = [index for index in INDEX_FILES if names[0].startswith(f"{index.split('.')[0]}-0")]
    remedy = (
        f"download {of_index[0]} too" if of_index else "give the folder that transformers loads"
    )
    return f", but {some(names)}; {remedy}"


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


def some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def plural(noun: str, items: list[str]) -> str:
    return noun if len(items) == 1 else f"{noun}s"


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
