"""The losses of `demo loop` are those of TRL's own trainer, on batches of its own making."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_engine.demo.losses import LOSSES, LossSettings, check_loss, preference_loss
from stream_engine.errors import ConfigError

SMOOTHING = {"robust": 0.1, "exo_pair": 0.001}
ROWS = [
    {"prompt": "a b c", "chosen": " d e", "rejected": " f g h i j"},
    {"prompt": "k", "chosen": " l m n o p q r", "rejected": " s"},
    {"prompt": "t u", "chosen": " v w x", "rejected": " y z a"},
    {"prompt": "b b b b", "chosen": " c", "rejected": " d d"},
]


@cache
def trls_trainer(folder: Path) -> Any:
    """TRL's trainer, with a model and a reference model of random weights that differ."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.8,
    )
    return trl.DPOTrainer(
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),
        args=trl.DPOConfig(
            output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_length=None
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=fast,
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: Any) -> Any:
    return trls_trainer(tmp_path_factory.mktemp("dpo"))


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_one_that_trl_computes(trainer: Any, name: str, rpo_alpha: float) -> None:
    alone = name == "sft"
    settings = LossSettings(
        loss=name,
        beta=0.3,
        label_smoothing=SMOOTHING.get(name, 0.0),
        rpo_alpha=1.0 if alone else rpo_alpha,
    )
    trainer.beta, trainer.label_smoothing = settings.beta, settings.label_smoothing
    trainer.loss_types = [name] if alone or not rpo_alpha else [name, "sft"]
    trainer.loss_weights = [1.0, rpo_alpha][: len(trainer.loss_types)]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, dict(batch))
        token_logps, is_answer = in_turn(*logps_of(trainer.model, batch))
        ref_logps = in_turn(*logps_of(trainer.ref_model, batch))[0].sum(1)
        ours = preference_loss(token_logps, ref_logps, is_answer, settings)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def logps_of(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [N, T] of the answers' tokens, 0 elsewhere, and where they are."""
    ids = batch["input_ids"]
    logits = model(ids, attention_mask=batch["attention_mask"]).logits
    is_answer = batch["completion_mask"][:, 1:].bool()
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps * is_answer, is_answer


def in_turn(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """TRL has all chosen rows first; here chosen and rejected take turns."""
    return [torch.stack(tensor.chunk(2), 1).flatten(0, 1) for tensor in tensors]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"loss": "exo_pair"}, "label_smoothing must be above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "sft", "rpo_alpha": 0.0}, "rpo_alpha"),
    ],
)
def test_what_makes_no_loss_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_loss(LossSettings(**settings))
