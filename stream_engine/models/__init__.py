"""Model families: which there are, and which one a checkpoint belongs to.

The family is read from the checkpoint's config.json, never from its path. Third parties add
families through the entry point group `stream_engine.models`. Importing this module does not
import torch; `load_model` does.
"""

from __future__ import annotations

import importlib
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError
from stream_engine.models.fingerprint import checkpoint_fingerprint

if TYPE_CHECKING:
    from stream_engine.models.base import VisionLanguageModel

__all__ = ["MODEL_FAMILIES", "checkpoint_fingerprint", "detect_family", "load_model"]


class Family(Protocol):
    """What a family's module offers."""

    def matches(self, config: dict[str, Any]) -> bool:
        """Whether a config.json belongs to this family (`architectures`, marker fields)."""

    def load(self, checkpoint: Path, config: ModelConfig) -> VisionLanguageModel:
        """Load strictly; raises CheckpointError naming what is missing, unexpected or wrong."""


# Tried in this order: the original formats first, since their configs can pass for native ones.
MODEL_FAMILIES = {
    "llava": "stream_engine.models.llava",
    "omnilmm": "stream_engine.models.omnilmm",
    "minicpm_v": "stream_engine.models.minicpm_v",
    "llava_onevision": "stream_engine.models.llava_onevision",
    "hf_vlm": "stream_engine.models.hf_vlm",
    "text_lm": "stream_engine.models.text_lm",
}

# Words of a --*_model_name that promise a family.
NAME_HINTS = {
    "llava": ("llava-v1.5", "llava-1.5", "llava15", "rlaif-v-7b"),
    "omnilmm": ("omnilmm", "rlaif-v-12b"),
    "minicpm_v": ("minicpm-v-2", "minicpm-llama3-v"),
    "llava_onevision": ("llava-critic",),
}


def detect_family(checkpoint: str | Path, *, name_hint: str | None = None) -> str:
    """The family of a checkpoint directory, from its config.json.

    Raises:
        CheckpointError: for a directory without config.json, a LoRA adapter, an unsupported
            architecture, or a `name_hint` that promises another family.
    """
    checkpoint = Path(checkpoint)
    config = read_checkpoint_config(checkpoint)
    families = dict(MODEL_FAMILIES)
    for entry in entry_points(group="stream_engine.models"):
        families = {entry.name: entry.value} | families
    for name, module in families.items():
        if importlib.import_module(module).matches(config):
            hinted = [f for f, words in NAME_HINTS.items() if _names(name_hint, words)]
            if hinted and name not in hinted:
                raise CheckpointError(
                    f"{checkpoint} is a {name} checkpoint, but the model name {name_hint!r} "
                    f"promises {hinted[0]}; drop the name or correct the path"
                )
            return name
    raise CheckpointError(
        f"{checkpoint} is {config.get('architectures')} (model_type {config.get('model_type')!r}), "
        f"which is not supported; supported families: {', '.join(families)}"
    )


def load_model(
    checkpoint: str | Path, config: ModelConfig, *, name_hint: str | None = None
) -> VisionLanguageModel:
    """Load a checkpoint with its family's loader, onto `config.device` in `config.dtype`.

    Raises:
        CheckpointError: with the file or tensor at fault.
    """
    name = detect_family(checkpoint, name_hint=name_hint)
    families = MODEL_FAMILIES | {
        entry.name: entry.value for entry in entry_points(group="stream_engine.models")
    }
    return importlib.import_module(families[name]).load(Path(checkpoint), config)


def read_checkpoint_config(checkpoint: Path) -> dict[str, Any]:
    """config.json as a dict.

    Raises:
        CheckpointError: when it is missing or is not JSON, or the directory holds a LoRA adapter.
    """
    path = checkpoint / "config.json"
    if (checkpoint / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} holds a LoRA adapter (adapter_config.json), which is not applied; "
            f"merge it into its base model and give that folder"
        )
    if not path.is_file():
        what = "has no config.json" if checkpoint.is_dir() else "is not a directory"
        raise CheckpointError(f"{checkpoint} {what}; give the folder of a downloaded checkpoint")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _names(hint: str | None, words: tuple[str, ...]) -> bool:
    return hint is not None and any(word in hint.lower() for word in words)
