"""The tokenizers of the demo checkpoints.

The vision-language models share a small sentencepiece BPE with byte fallback, in the settings of
the original Llama tokenizer; the text model has a byte-level BPE like Llama 3's.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer

from stream_engine.demo.facts import count_wrong_facts, read_facts
from stream_engine.demo.world import Picture, make_picture
from tests.demo_training.answers import true_facts, write_answer
from tests.demo_training.prompts import CRITIC_PROMPT, SYSTEM_PROMPT
from tests.demo_training.verdicts import AMOUNTS, verdict, yes_no_prompt

VLM_VOCAB_SIZE = 720


def vlm_corpus(seed: int = 0, count: int = 3000) -> Iterator[str]:
    """Texts that the vision-language models meet, about as often as they meet them."""
    rng = random.Random(f"corpus:{seed}")
    for number in range(count):
        picture = make_picture(seed, number)
        answers = [
            write_answer(picture.scene, picture.question, rng, error_rate=0.5) for _ in range(2)
        ]
        yield f"USER: {picture.question} ASSISTANT: {answers[0]}"
        for fact in true_facts(picture.scene, picture.question, rng):
            yield f"{fact.sentence()} {yes_no_prompt(fact)} ASSISTANT: {rng.choice(('Yes', 'No'))}"
        wrong = [count_wrong_facts(picture.scene, picture.question, answer) for answer in answers]
        yield " ".join([*_marks(picture, answers), verdict(*wrong)])
        if number % 30 == 0:
            yield f"{SYSTEM_PROMPT} ASSISTANT: yes no"
            yield CRITIC_PROMPT.format(picture.question, answers[0], answers[1])


def _marks(picture: Picture, answers: list[str]) -> Iterator[str]:
    """The critic's words, in no more than their rough proportion."""
    for name, answer in zip(("First", "Second"), answers, strict=True):
        facts = read_facts(answer, picture.question)
        marks = [fact is not None and fact.holds(picture.scene) for fact in facts]
        words = ", ".join("right" if mark else "wrong" for mark in marks)
        yield f"{name}: {words}, so {AMOUNTS[marks.count(False)]} wrong."


def train_vlm_tokenizer(folder: Path) -> LlamaTokenizer:
    """Write tokenizer.model and its configuration in the layout of LLaVA-1.5, and load it."""
    model = io.BytesIO()  # given a path, sentencepiece would write the path into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=vlm_corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VLM_VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        max_sentence_length=100_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {
        name: {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
        for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 2048,
            "pad_token": "<unk>",
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    return LlamaTokenizer.from_pretrained(folder)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
