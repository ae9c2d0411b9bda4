"""TRL itself takes the TRL dataset: one DPO step over every row, with a tiny random LLaVA.

The rows have one image, two, or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stream_engine.run_dir.paths import RunDir
from tests.synthetic import WORDS, run_merge, synthetic_sample, write_run

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] }}:
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif -%}
{%- endfor %} </s> {% endfor -%}
{%- if add_generation_prompt %}assistant:{% endif -%}
"""


VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:", *WORDS)


def tiny_configs(vocab_size: int) -> dict[str, Any]:
    """The text model's and the tower's configuration, by their names in LlavaConfig."""
    from transformers import CLIPVisionConfig, LlamaConfig

    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    return {"text_config": text, "vision_config": vision}


def save_tiny_llava(folder: Path) -> None:
    """A LLaVA of a few thousand random parameters with 4 image tokens, and its processor."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        **tiny_configs(len(VOCABULARY)), image_token_index=VOCABULARY.index("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def test_trl_takes_one_step_on_the_written_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    run_dir = RunDir(tmp_path / "run")
    samples = [synthetic_sample(i, num_images=(1, 0, 2, 1)[i]) for i in range(4)]
    write_run(run_dir, samples, num_words=8)
    report = run_merge(run_dir, format=("trl",))
    save_tiny_llava(tmp_path / "llava")
    pairs = datasets.load_dataset(report.dataset, cache_dir=str(tmp_path / "cache"))["train"]
    trainer = trl.DPOTrainer(
        model=str(tmp_path / "llava"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_length=None,
            max_steps=1,
            per_device_train_batch_size=report.written,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=pairs,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0)
    changed = [n for n, p in trainer.model.named_parameters() if not before[n].equal(p)]
    assert any("lm_head" in name for name in changed)
    assert any("projector" in name for name in changed), "the image must reach the loss"
