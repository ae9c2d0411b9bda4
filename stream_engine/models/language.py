"""The native language model inside a checkpoint whose config.json is flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from stream_engine.errors import CheckpointError
from stream_engine.models.checkpoints import Rename, empty_weights, load_into
from stream_engine.models.intact import read_json
from stream_engine.models.native import check_length
from stream_engine.models.weight_files import WeightFiles

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

LANGUAGE_NAME = r"model\.(embed_tokens|layers|norm)\.|lm_head\."
"""How a *ForCausalLM's own tensors begin; LLaVA-style checkpoints store them so."""

OLD_ROPE_FIELDS = ("rope_theta", "rope_scaling")
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def language_config(
    config_class: type[PreTrainedConfig], stated: dict[str, Any]
) -> PreTrainedConfig:
    """The fields of `config_class` that a flat config.json states, with "sdpa" attention.

    Fields of other parts and `model_type` are left out, and so are token ids, which do not bear on
    the weights. Always a fresh object: two models on one config can turn each other non-causal.
    """
    known = set(config_class().to_dict()) - set(TOKEN_FIELDS) - {"model_type", "architectures"}
    fields = {k: v for k, v in stated.items() if k in known or k in OLD_ROPE_FIELDS}
    config = config_class(**fields)
    config._attn_implementation = "sdpa"
    return config


def load_language_model(
    model_class: type[ModelT],
    stated: dict[str, Any],
    weights: WeightFiles,
    rename: Rename,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> ModelT:
    """Build `model_class` from a flat config.json and fill it; see `load_into` for errors."""
    config_class = model_class.config_class
    assert config_class is not None
    with empty_weights():
        model = model_class(language_config(config_class, stated))
    return load_into(model, weights, rename, device=device, dtype=dtype)


def load_tokenizer(checkpoint: Path) -> Any:
    """tokenizer.json as it stands, whatever class and remote code tokenizer_config.json names.

    Without one, a sentencepiece model is read as Llama's, vocabulary and merges as Qwen2's.

    Raises:
        CheckpointError: when there is none of them.
    """
    kinds = {
        "tokenizer.json": PreTrainedTokenizerFast,
        "tokenizer.model": LlamaTokenizer,
        "vocab.json": Qwen2Tokenizer,
    }
    for file, kind in kinds.items():
        if (checkpoint / file).is_file():
            tokenizer = kind.from_pretrained(checkpoint, local_files_only=True)
            check_length(checkpoint, tokenizer)
            return tokenizer
    raise CheckpointError(f"{checkpoint} has no {' or '.join(kinds)}; download it again")


def stop_token_ids(checkpoint: Path, tokenizer: Any, *more: str) -> frozenset[int]:
    """The tokenizer's end token, those of generation_config.json, and `more` tokens by name.

    Raises:
        CheckpointError: when the vocabulary lacks one of `more`.
    """
    stated = read_json(checkpoint / "generation_config.json").get("eos_token_id")
    ids = {tokenizer.eos_token_id}
    ids |= set(stated) if isinstance(stated, list) else {stated}
    return frozenset(ids - {None}) | {token_id(tokenizer, name, checkpoint) for name in more}


def token_id(tokenizer: Any, token: str, checkpoint: Path) -> int:
    """The id of one token of the vocabulary; raises CheckpointError when it is not there."""
    ids = tokenizer.get_vocab()
    if token not in ids:
        raise CheckpointError(f"{checkpoint}: the tokenizer has no token {token!r}")
    return ids[token]
