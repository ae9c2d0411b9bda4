"""Which original format a config.json is of; imports no torch, so that to tell costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def is_llava(config: dict[str, Any]) -> bool:
    """Original: by architecture and `mm_vision_tower`. llava-hf: CLIP under a Llama-2 tokenizer."""
    architectures = config.get("architectures") or []
    if "LlavaLlamaForCausalLM" in architectures:
        return "mm_vision_tower" in config
    if "LlavaForConditionalGeneration" in architectures:
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        return (
            text.get("model_type", "llama") == "llama"
            and vision.get("model_type", "clip_vision_model") == "clip_vision_model"
            and text.get("bos_token_id", 1) == 1
            and isinstance(config.get("vision_feature_layer", -2), int)
        )
    return False


def is_omnilmm(config: dict[str, Any]) -> bool:
    """By architecture and `mm_vision_tower`."""
    return (
        "OmniLMMForCausalLM" in (config.get("architectures") or []) and "mm_vision_tower" in config
    )


def is_minicpm_v(config: dict[str, Any]) -> bool:
    """By architecture, the resampler's `query_num`, and the tower's config."""
    architectures = config.get("architectures") or []
    return "MiniCPMV" in architectures and {"query_num", "vision_config"} <= config.keys()


def is_llava_onevision(config: dict[str, Any]) -> bool:
    """By architecture and `mm_vision_tower`."""
    return (
        "LlavaQwenForCausalLM" in (config.get("architectures") or [])
        and "mm_vision_tower" in config
    )


FORMATS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "llava": is_llava,
    "omnilmm": is_omnilmm,
    "minicpm_v": is_minicpm_v,
    "llava_onevision": is_llava_onevision,
}
"""By the family that loads it. Other families' modules tell themselves; see `models.Family`."""
