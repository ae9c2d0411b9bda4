"""Train the demo's text model: it splits answers into facts and turns facts into questions.

    python -m tests.demo_training.text --out /tmp/demo
    python -m tests.demo_training.text --out /tmp/demo --go_on_from OLD/text --steps 900

The second form goes on from a checkpoint, with its tokenizer: where a prompt has changed a
little, a third of the steps is enough. The checkpoint of the package was last made so. From
scratch, copying is learnt late, and not within these steps by every seed: a loss near 0.09 at the
end says that it was not, 0.03 or less that it was.

A plain Llama with a Llama-3-like tokenizer and chat template; it sees no picture.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stream_engine.demo.facts import Fact, read_facts
from stream_engine.demo.world import random_question, random_scene
from tests.demo_training import loop
from tests.demo_training.answers import corrupt, true_facts, write_answer
from tests.demo_training.prompts import rewrite_prompt, split_prompt

VOCAB_SIZE = 640
MAX_POSITIONS = 2048
BATCH_SIZE = 48
IGNORE = -100
BEGIN, START_HEADER, END_HEADER, END_TURN = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def write_task(rng: random.Random, *, mixed_share: float) -> tuple[str, str]:
    """A prompt and its answer: half of them split an answer, half rewrite facts.

    `mixed_share` of the lists to rewrite are mixed, the others are the facts of one answer.
    """
    scene = random_scene(rng)
    question = random_question(scene, rng)
    kind = rng.random()
    if kind >= 0.5 and kind < 0.5 + 0.5 * mixed_share:
        return rewrite_task(mixed_facts(rng))
    answer = write_answer(scene, question, rng, error_rate=0.6)
    facts = [fact for fact in read_facts(answer, question) if fact is not None]
    if kind >= 0.5:
        return rewrite_task(facts)
    sentences = [fact.sentence() for fact in facts]
    return split_prompt(question, answer), list_under("### Facts:", sentences)


def rewrite_task(facts: list[Fact]) -> tuple[str, str]:
    prompt = rewrite_prompt([fact.sentence() for fact in facts])
    return prompt, list_under("### Modified sentences:", [fact.question() for fact in facts])


def mixed_facts(rng: random.Random) -> list[Fact]:
    """One to five facts about as many scenes: a list that no single answer gives."""
    facts: list[Fact] = []
    for _ in range(rng.choice((1, 2, 3, 4, 4, 4, 4, 5))):
        scene = random_scene(rng)
        fact = rng.choice(true_facts(scene, random_question(scene, rng), rng))
        facts.append(corrupt(fact, rng) if rng.random() < 0.5 else fact)
    return facts


def list_under(heading: str, lines: list[str]) -> str:
    return "\n".join([heading, *(f"- {line}" for line in lines)])


def train_text_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer with a chat template, and load it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random("text corpus")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN, START_HEADER, END_HEADER, END_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        text for _ in range(3000) for text in (*write_task(rng, mixed_share=1.0), "user assistant")
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_TURN,
        pad_token=END_TURN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that all versions know
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def prompt_text(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def batch(
    tokenizer: PreTrainedTokenizerFast, tasks: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels [B, T] of (prompt, answer) texts."""
    rows = []
    for prompt, answer in tasks:
        prompt_ids = tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False).input_ids
        answer_ids = tokenizer(answer + END_TURN, add_special_tokens=False).input_ids
        rows.append((prompt_ids, answer_ids))
    width = max(len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORE)
    for row, (prompt_ids, answer_ids) in enumerate(rows):
        length = len(prompt_ids) + len(answer_ids)
        ids[row, :length] = torch.tensor(prompt_ids + answer_ids)
        labels[row, len(prompt_ids) : length] = torch.tensor(answer_ids)
    return ids, labels


def common_prefix(ids: Tensor) -> int:
    """How many leading columns are the same in all rows."""
    same = (ids == ids[:1]).all(dim=0).int()
    return int(same.cumprod(0).sum())


def loss_of_batch(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of the labelled tokens; what all rows begin with runs once."""
    shared = common_prefix(ids)
    cache = model.model(ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    hidden = model.model(ids[:, shared:-1], past_key_values=cache, use_cache=True).last_hidden_state
    targets = labels[:, shared + 1 :]
    wanted = targets != IGNORE
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def text_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def main() -> None:
    parser = loop.arguments(__doc__ or "", steps=2000)
    parser.add_argument("--go_on_from", type=Path, help="a checkpoint of this model")
    args = loop.start(parser)
    folder = args.out / "text"
    if args.go_on_from is None:
        tokenizer = train_text_tokenizer(folder)
        model = LlamaForCausalLM(text_config(tokenizer))
    else:
        shutil.copytree(args.go_on_from, folder, dirs_exist_ok=True)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = tokenizer.eos_token_id
    rng = random.Random(f"text:{args.seed}")
    waiting: dict[bool, list[tuple[str, str]]] = {True: [], False: []}

    def loss_of_tasks(is_split: bool, mixed_share: float) -> Tensor:
        """One kind a batch, so that its rows begin with the same long prompt."""
        tasks = waiting[is_split]
        while len(tasks) < BATCH_SIZE:
            task = write_task(rng, mixed_share=mixed_share)
            waiting[task[1].startswith("### Facts")].append(task)
        loss = loss_of_batch(model, *batch(tokenizer, tasks[:BATCH_SIZE]))
        del tasks[:BATCH_SIZE]
        return loss

    if args.go_on_from is None:
        loop.train(model, lambda step: loss_of_tasks(step % 2 == 0, 1.0), steps=args.steps, lr=2e-3)
    # Splitting is learnt by now; the last errors in copying are rewriting's.
    polish = args.steps // 3
    loop.train(model, lambda step: loss_of_tasks(step % 4 == 0, 0.4), steps=polish, lr=1.5e-3)
    model.half().save_pretrained(folder)
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end}
    generation |= {"pad_token_id": end, "max_new_tokens": 128}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
