"""What tiny checkpoints of native architectures are made of; `writers_hf` writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 8}
PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 12,
    "image_size": 56,
    "patch_size": 14,
}
SQUARE = {"height": 28, "width": 28}


@dataclass(frozen=True)
class Architecture:
    """How to write one: everything that is not common to all."""

    model_type: str
    processor: str
    image_processor: Callable[[], Any]
    image: str
    """What the chat template writes for an image."""
    specials: tuple[str, ...]
    """Special tokens after the common ones, from id 260 on."""
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    processor_config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    shares_prefix: bool = True


def pil(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**options)


QWEN = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "specials": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "config": {
        "vision_start_token_id": 260,
        "vision_end_token_id": 261,
        "image_token_id": 262,
        "video_token_id": 263,
    },
}
QWEN_PIXELS = pil("Qwen2VLImageProcessorPil", min_pixels=28 * 28 * 2, max_pixels=28 * 28 * 12)
QWEN3_PIXELS = pil(
    "Qwen2VLImageProcessorPil", patch_size=16, min_pixels=32 * 32 * 2, max_pixels=32 * 32 * 12
)
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 16,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
}
IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}

ARCHITECTURES = {
    "qwen2_vl": Architecture(
        "qwen2_vl",
        "Qwen2VLProcessor",
        QWEN_PIXELS,
        text=MROPE,
        vision={"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2},
        **QWEN,
    ),
    "qwen2_5_vl": Architecture(
        "qwen2_5_vl",
        "Qwen2_5_VLProcessor",
        QWEN_PIXELS,
        text=MROPE,
        vision={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **QWEN,
    ),
    "qwen3_vl": Architecture(
        "qwen3_vl", "Qwen3VLProcessor", QWEN3_PIXELS, text=MROPE, vision=QWEN3_VISION, **QWEN
    ),
    "qwen3_vl_moe": Architecture(
        "qwen3_vl_moe",
        "Qwen3VLProcessor",
        QWEN3_PIXELS,
        text=MROPE | MOE,
        vision=QWEN3_VISION,
        **QWEN,
    ),
    "internvl": Architecture(
        "internvl",
        "InternVLProcessor",
        pil("GotOcr2ImageProcessorPil", size=SQUARE, crop_to_patches=True, max_patches=4),
        image="<IMG_CONTEXT>\n",
        specials=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        text={"model_type": "qwen2"},
        vision={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        config={"image_token_id": 262, "downsample_ratio": 0.5},
        processor_config={"image_seq_length": 4},
        tokenizer={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "gemma3": Architecture(
        "gemma3",
        "Gemma3Processor",
        pil("Gemma3ImageProcessorPil", size=SQUARE),
        image="<start_of_image>",
        specials=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        text={
            "model_type": "gemma3_text",
            "sliding_window": 1024,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
        vision=SIGLIP,
        config={
            "image_token_index": 262,
            "boi_token_index": 260,
            "eoi_token_index": 261,
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
        },
        processor_config={"image_seq_length": 4},
        tokenizer={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        shares_prefix=False,
    ),
    "llava_next": Architecture(
        "llava_next",
        "LlavaNextProcessor",
        pil(
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": 28},
            crop_size=SQUARE,
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        image="<image>\n",
        specials=("<image>",),
        text={"model_type": "mistral", "sliding_window": None},
        vision=CLIP,
        config={
            "image_token_index": 260,
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
            "image_seq_length": 4,
        },
        processor_config={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": Architecture(
        "llava_onevision",
        "LlavaOnevisionProcessor",
        pil(
            "LlavaOnevisionImageProcessorPil",
            size=SQUARE,
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
        ),
        image="<image>\n",
        specials=("<image>", "<video>"),
        text={"model_type": "qwen2"},
        vision=SIGLIP | {"vision_use_head": False},
        config={
            "image_token_index": 260,
            "video_token_index": 261,
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        processor_config={
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    "idefics3": Architecture(
        "idefics3",
        "Idefics3Processor",
        pil(
            "Idefics3ImageProcessorPil",
            size={"longest_edge": 56},
            max_image_size={"longest_edge": 28},
        ),
        image="<image>",
        specials=IDEFICS_TOKENS,
        text={"model_type": "llama"},
        vision=SIGLIP | {"model_type": "idefics3_vision", "patch_size": 7},
        config={"image_token_id": 261, "scale_factor": 2},
        processor_config={"image_seq_len": 4},
    ),
    "mistral3": Architecture(
        "mistral3",
        "PixtralProcessor",
        pil("PixtralImageProcessorPil", size={"longest_edge": 84}, patch_size=14),
        image="[IMG]",
        specials=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        text={"model_type": "mistral", "sliding_window": None},
        vision=PIXTRAL | {"image_size": 84},
        config={"image_token_index": 260, "spatial_merge_size": 2, "vision_feature_layer": -1},
        processor_config={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "pixtral": Architecture(
        "llava",
        "PixtralProcessor",
        pil("PixtralImageProcessorPil", size={"longest_edge": 56}, patch_size=14),
        image="[IMG]",
        specials=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        text={"model_type": "mistral", "sliding_window": None},
        vision=PIXTRAL,
        config={
            "image_token_index": 260,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        processor_config={"patch_size": 14},
    ),
    "aya_vision": Architecture(
        "aya_vision",
        "AyaVisionProcessor",
        pil("GotOcr2ImageProcessorPil", size=SQUARE, crop_to_patches=False),
        image="<image>",
        specials=(
            "<image>",
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            "TILE",
            "TILE_GLOBAL",
        ),
        text={
            "model_type": "cohere2",
            "logit_scale": 0.25,
            "sliding_window": 4096,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        vision=SIGLIP | {"patch_size": 7},
        config={"image_token_index": 263, "downsample_factor": 2, "tie_word_embeddings": True},
        processor_config={"patch_size": 7, "img_size": 28, "downsample_factor": 2},
    ),
    "granite": Architecture(
        "llava_next",
        "LlavaNextProcessor",
        pil(
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": 28},
            crop_size=SQUARE,
            image_grid_pinpoints=[[28, 56], [56, 28]],
        ),
        image="<image>\n",
        specials=("<image>",),
        text={
            "model_type": "granite",
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
        vision=SIGLIP,
        config={
            "image_token_index": 260,
            "image_grid_pinpoints": [[28, 56], [56, 28]],
            "image_seq_length": 4,
            "vision_feature_select_strategy": "full",
        },
        processor_config={"patch_size": 14, "vision_feature_select_strategy": "full"},
    ),
    "smolvlm": Architecture(
        "smolvlm",
        "SmolVLMProcessor",
        pil(
            "SmolVLMImageProcessorPil",
            size={"longest_edge": 56},
            max_image_size={"longest_edge": 28},
        ),
        image="<image>",
        specials=IDEFICS_TOKENS,
        text={"model_type": "llama"},
        vision=SIGLIP | {"model_type": "smolvlm_vision", "patch_size": 7},
        config={"image_token_id": 261, "scale_factor": 2},
        processor_config={"image_seq_len": 4},
    ),
    "qwen3_5": Architecture(
        "qwen3_5",
        "Qwen3VLProcessor",
        QWEN3_PIXELS,
        text={
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        vision={k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"},
        shares_prefix=False,
        **QWEN,
    ),
    "glm4v": Architecture(
        "glm4v",
        "Glm4vProcessor",
        pil("Glm4vImageProcessorPil", size={"shortest_edge": 1568, "longest_edge": 28 * 28 * 24}),
        image="<|begin_of_image|><|image|><|end_of_image|>",
        specials=(
            "<|begin_of_image|>",
            "<|end_of_image|>",
            "<|image|>",
            "<|video|>",
            "<|begin_of_video|>",
            "<|end_of_video|>",
        ),
        text={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 1.0,
            }
        },
        vision={
            "depth": 2,
            "hidden_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "image_size": 56,
        },
        config={
            "image_start_token_id": 260,
            "image_end_token_id": 261,
            "image_token_id": 262,
            "video_token_id": 263,
            "video_start_token_id": 264,
            "video_end_token_id": 265,
        },
    ),
}
