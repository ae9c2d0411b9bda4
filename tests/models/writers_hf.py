"""Tiny random checkpoints of native architectures, with processors, as their hub repositories have.

The vocabulary is the 256 bytes and the special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.models.hf_architectures import ARCHITECTURES

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{{% for m in messages %}}<|turn|>{{{{ m.role }}}}\n{{% for c in m.content %}}"
    "{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}"
    "<|end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|turn|>assistant\n{{% endif %}}"
)

SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>", "<|turn|>"]
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}


def write_hf(folder: Path, name: str, *, seed: int = 0) -> Path:
    """The tiny checkpoint called `name`, complete on disk.

    Skips the test where this transformers makes no image processor of it without torchvision.
    """
    arch = ARCHITECTURES[name]
    try:
        image_processor = arch.image_processor()
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        pytest.skip(f"{name}: this transformers' image processor needs torchvision")
    config_class = type(transformers.AutoConfig.for_model(arch.model_type))
    config = config_class(
        text_config={**TEXT, **_model_type(config_class, "text_config"), **arch.text},
        vision_config=arch.vision,
        **{"tie_word_embeddings": False, **arch.config},
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    generation = {"eos_token_id": 257, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))

    tokenizer = byte_tokenizer(SPECIALS + list(arch.specials), extra=arch.tokenizer)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    stated = {"processor_class": arch.processor, **arch.processor_config}
    (folder / "processor_config.json").write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(TEMPLATE.format(image=arch.image))
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Weights under which the order of tokens matters: queries and keys are large."""
    for name, parameter in model.named_parameters():
        std = 0.5 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 0.12
        torch.nn.init.normal_(parameter, mean=0.02, std=std)


def byte_tokenizer(
    specials: list[str], extra: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, then the special tokens."""
    core = Tokenizer(models.BPE(vocab={b: i for i, b in enumerate(BYTES)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=extra or {},
    )


def _model_type(config_class: Any, part: str) -> dict[str, str]:
    """The model type of a sub-configuration that has one class only."""
    sub = config_class.sub_configs.get(part)
    kind = getattr(sub, "model_type", "")
    return {"model_type": kind} if kind else {}
