"""Model families: which there are, and which one a checkpoint belongs to.

The family is read from the checkpoint's config.json, never from its path: formats.py tells the
original formats. Third parties add families through an entry point, a module with
`matches(config)` and `load(checkpoint, config)`:

    [project.entry-points."stream_engine.models"]
    acme = "acme_family"

Importing this module does not import torch; `load_model` does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stream_engine.config import ModelConfig
from stream_engine.errors import CheckpointError, ConfigError
from stream_engine.extensions import installed
from stream_engine.models.fingerprint import checkpoint_fingerprint
from stream_engine.models.formats import FORMATS
from stream_engine.models.intact import read_json, refuse_broken_files

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

# Words of a --*_model_name that promise a family, besides the family's own name. Case and
# punctuation do not count; of several words in a name the longest does.
NAME_HINTS = {
    "llava": ("llava-v1.5", "llava-1.5", "rlaif-v-7b"),
    "omnilmm": ("omnilmm", "rlaif-v-12b"),
    "minicpm_v": ("minicpm-v-2", "minicpm-llama3-v"),
    "llava_onevision": ("llava-critic", "llava-onevision"),
    "hf_vlm": (
        *(
            "qwen2-vl",
            "qwen2.5-vl",
            "qwen3-vl",
            "internvl",
            "gemma-3",
            "smolvlm",
            "mistral-small-3",
        ),
        *("llava-next", "llava-v1.6", "llava-onevision"),
    ),
    "text_lm": ("llama-3",),
}


def detect_family(checkpoint: str | Path, *, name_hint: str | None = None) -> str:
    """The family of a checkpoint directory, from its config.json.

    Raises:
        CheckpointError: for a directory without config.json, a LoRA adapter, an unsupported
            architecture, or a `name_hint` that promises another family.
        ConfigError: for a `name_hint` that promises none.
    """
    checkpoint = Path(checkpoint)
    config = read_checkpoint_config(checkpoint)
    families = installed("stream_engine.models") | MODEL_FAMILIES
    for name, module in families.items():
        matches = FORMATS.get(name) or importlib.import_module(module).matches
        if matches(config):
            if name_hint:
                promised = promised_families(name_hint, list(families), config)
                if name not in (promised or [name]):
                    raise CheckpointError(
                        f"{checkpoint} is a {name} checkpoint, but the model name {name_hint!r} "
                        f"promises {promised[0]}; drop the name or correct the path"
                    )
            return name
    if not config.get("architectures"):
        raise CheckpointError(
            f"{checkpoint / 'config.json'} names no architectures; copy the line from the original"
        )
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
    from stream_engine.models.native import naming_checkpoint

    name = detect_family(checkpoint, name_hint=name_hint)
    families = installed("stream_engine.models") | MODEL_FAMILIES
    with naming_checkpoint(Path(checkpoint)):
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
        raise CheckpointError(
            f"{checkpoint} {what}; give the folder of a downloaded checkpoint"
            + folders_within(checkpoint)
        )
    refuse_broken_files(checkpoint)
    return read_json(path)


def folders_within(checkpoint: Path) -> str:
    """Which folders in this one may be meant: those of a training run, or the hub's snapshots."""
    if any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("*.bin")):
        return ""
    configs = [*checkpoint.glob("*/config.json"), *checkpoint.glob("snapshots/*/config.json")]
    names = sorted(str(path.parent.relative_to(checkpoint)) for path in configs)
    return f", here one of {', '.join(names[:3])}" if names else ""


def promised_families(hint: str, families: list[str], config: dict[str, Any]) -> list[str]:
    """The families that a model name promises; none when it names the checkpoint's own model type.

    Raises:
        ConfigError: for a name that says nothing of any known family.
    """
    name = _letters(hint)
    exact = [family for family in families if _letters(family) == name]
    if exact:
        return exact
    found = [
        (len(_letters(word)), family)
        for family, words in NAME_HINTS.items()
        for word in words
        if _letters(word) in name
    ]
    if found:
        return [family for length, family in found if length == max(found)[0]]
    own = _letters(config.get("model_type") or "")
    if own and own in name:
        return []
    known = ", ".join((*families, *dict.fromkeys(w for ws in NAME_HINTS.values() for w in ws)))
    raise ConfigError(
        f"unknown model name {hint!r}; drop it, or give one with any of {known} in it"
    )


def _letters(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(filter(str.isalnum, name.lower()))
