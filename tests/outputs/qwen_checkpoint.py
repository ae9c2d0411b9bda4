"""A tiny Qwen2.5-VL under the published tokenizer's special ids and chat template.

ms-swift and LLaMA-Factory keep templates of their own for a family, and hard-code its ids; the
tiny checkpoints of tests/models have others. The words of the vocabulary are bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.models.hf_architectures import ARCHITECTURES
from tests.models.writers_hf import BYTES, TEXT, randomize

FIRST_SPECIAL = 151643
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Of Qwen/Qwen2.5-VL-7B-Instruct's tokenizer.json, in order of their ids."""
IDS = {token: FIRST_SPECIAL + i for i, token in enumerate(SPECIALS)}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of the same repository's chat_template.json, without video and numbered pictures."""


def write_qwen(folder: Path) -> Path:
    """The checkpoint, complete on disk."""
    arch = ARCHITECTURES["qwen2_5_vl"]
    vocab_size = FIRST_SPECIAL + len(SPECIALS)
    text = {**TEXT, **arch.text, "vocab_size": vocab_size, "model_type": "qwen2_5_vl_text"}
    text |= {"bos_token_id": FIRST_SPECIAL, "eos_token_id": IDS["<|im_end|>"]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | {"pad_token_id": FIRST_SPECIAL},
        vision_config=arch.vision,
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    generation = {"eos_token_id": [IDS["<|im_end|>"], FIRST_SPECIAL]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer().save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(
        min_pixels=56 * 56, max_pixels=28 * 28 * 64
    ).save_pretrained(folder)
    stated = {"processor_class": "Qwen2_5_VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, words that never come up to the first special id, then the special ones."""
    words = [*BYTES, *(f"<unused {i}>" for i in range(len(BYTES), FIRST_SPECIAL))]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
