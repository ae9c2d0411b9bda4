"""The demo's instruct model in the layout of llava-hf, which servers of others can run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlamaTokenizerFast, LlavaProcessor

from stream_engine.demo import checkpoint_path
from stream_engine.models.llava import SYSTEM

IMAGE = "<image>"
HEAD = 32
"""vLLM's attention on CPU knows no smaller head than this."""
TEMPLATE = (
    SYSTEM + " {% for m in messages %}USER: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
    " {% endfor %}ASSISTANT:"
)


def write_instruct(folder: Path) -> Path:
    """LlavaForConditionalGeneration of the demo's instruct model, with processor and template."""
    source = checkpoint_path("instruct")
    stated = json.loads((source / "config.json").read_text())
    vision = json.loads((source / "vision_tower/config.json").read_text())
    folder.mkdir(parents=True)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "vision_tower" in name:
            ours = name.removeprefix("model.vision_tower.vision_tower.")
            tensors[f"vision_tower.{ours}"] = tensor
        elif name.startswith("model.mm_projector."):
            layer, part = name.removeprefix("model.mm_projector.").split(".")
            tensors[f"multi_modal_projector.linear_{1 + int(layer) // 2}.{part}"] = tensor
        else:
            if name in ("model.embed_tokens.weight", "lm_head.weight"):  # a row for the mark
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
            tensors[f"language_model.{name}"] = padded(name, tensor, stated)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = {name: value for name, value in stated.items() if not name.startswith(("mm_", "image_"))}
    own_head = stated["hidden_size"] // stated["num_attention_heads"]
    theta = stated["rope_theta"] ** (HEAD / own_head)  # the same angles in larger heads
    text |= {"model_type": "llama", "head_dim": HEAD, "rope_theta": theta}
    text["architectures"] = ["LlamaForCausalLM"]
    text["vocab_size"] = stated["vocab_size"] + 1
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "float16",
        "image_token_index": stated["vocab_size"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": stated["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "generation_config.json", folder / "generation_config.json")
    tokenizer = LlamaTokenizerFast.from_pretrained(source)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(IMAGE) == stated["vocab_size"]
    processor = LlavaProcessor(
        CLIPImageProcessor.from_pretrained(source / "vision_tower"),
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def padded(name: str, tensor: torch.Tensor, stated: dict[str, Any]) -> torch.Tensor:
    """Attention's projections with heads of HEAD, filled up with zeros, that compute the same.

    Rotary halves stay halves; queries are scaled by what the larger head takes off their products.
    """
    number = stated["num_attention_heads"]
    size = stated["hidden_size"] // number
    half = torch.arange(size // 2)
    place = torch.cat([half, half + HEAD // 2])
    if ".q_proj." in name or ".k_proj." in name or ".v_proj." in name:
        heads = tensor.new_zeros(number, HEAD, tensor.shape[1])
        heads[:, place] = tensor.view(number, size, -1)
        return heads.view(number * HEAD, -1) * ((HEAD / size) ** 0.5 if ".q_proj." in name else 1)
    if ".o_proj." in name:
        columns = tensor.new_zeros(tensor.shape[0], number, HEAD)
        columns[:, :, place] = tensor.view(-1, number, size)
        return columns.view(tensor.shape[0], -1)
    return tensor
