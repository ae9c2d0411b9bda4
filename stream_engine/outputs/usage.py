"""What a card says of training: for each format a complete command or configuration.

Each is run as it stands by tests/outputs/test_training.py, with a tiny model and two steps. Knows
no dataset: the folder, the model and the names of files are the card's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FOLDER = "path/to/this/folder"
MODEL = "your/instruct-model"
REWARD_MODEL = "your/language-model"

LOSS = """\
The loss is DPO's with a beta of 0.5 and, beside it, the log-likelihood of the chosen answer (RPO,
weight 1): with a beta of 0.1 alone it takes probability from the chosen answers too. Measured on
the embedded world (`stream-engine demo loop`, 150 steps at a learning rate of 1e-4, mean of three
seeds), wrong facts per answer are 1.74 before, and after training on the pairs of dpo_reward,
divide_and_conquer and llava_critic with `--strict_follow_rank`

- 1.23, 1.03 and 1.10 by plain DPO with a beta of 0.1,
- 0.28, 0.30 and 0.36 by plain DPO with a beta of 0.5,
- 0.23, 0.44 and 0.30 with a beta of 0.1 and the term,
- 0.22, 0.26 and 0.28 with both.

At 3e-4, three times that rate, plain DPO makes it worse (2.26, 2.62 and 1.91), and with both 0.34,
0.39 and 0.39 are left. A critic's pairs without that flag teach less (0.35 with both, two seeds):
their margins are wider, but fewer answers take part. Your model is not this one: watch the chosen
answers' log-prob, which plain DPO lowers. To train on the likelier half of the pairs instead, or to
stop early, did not do as much."""

TRL = """\
```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

pairs = load_dataset("{folder}")
args = DPOConfig(
    output_dir="dpo",
    max_length=None,  # the default cuts image tokens off
    beta=0.5,
    loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 1.0],  # rpo_alpha 1.0
)
trainer = DPOTrainer(
    model="{model}",
    args=args,
    train_dataset=pairs["train"],{test_argument}
)
trainer.train()
```

{loss}

axolotl builds its DPO on this trainer, whose collator for pictures takes these rows as they are:
`rl: dpo` and this folder under `datasets`, with `rl_beta: 0.5` and `rpo_alpha: 1.0`. It was not run
here. OpenRLHF and verl read texts only: they would train on the answers without their pictures."""

MS_SWIFT = """\
```bash
swift rlhf --rlhf_type dpo --model {model} \\
    --dataset {train_files} \\
{test_files}    --beta 0.5 --rpo_alpha 1.0 --output_dir dpo
```

{loss}

ms-swift's own template for LLaVA-1.5 has no system prompt and breaks the line before `ASSISTANT:`:
it trains on other words than the model was asked. Qwen2.5-VL's is the one that was asked."""

LLAMA_FACTORY = """\
Write this to `dpo.yaml`, then `llamafactory-cli train dpo.yaml`:

```yaml
model_name_or_path: {model}
template: qwen2_vl
stage: dpo
do_train: true
finetuning_type: full
dataset_dir: {folder}
{media}dataset: stream_engine
{test_dataset}cutoff_len: 4096
pref_beta: 0.5
pref_ftx: 1.0
output_dir: dpo
per_device_train_batch_size: 1
learning_rate: 1.0e-6
```

`pref_ftx` is what other trainers call `rpo_alpha`.

{loss}

`template` is the model's: `qwen2_vl` is the prompt that Qwen2.5-VL was asked; `llava` says "a
curious user" where LLaVA-1.5 was asked as "a curious human"."""

TRL_REWARD = """\
```python
from datasets import load_dataset
from trl import RewardConfig, RewardTrainer

pairs = load_dataset("{folder}")
trainer = RewardTrainer(
    model="{reward_model}",
    args=RewardConfig(output_dir="reward", max_length=None),
    train_dataset=pairs["train"],{test_argument}
)
trainer.train()
```

TRL's trainer of reward models reads texts: it makes a classifier of a language model, and does not
look at `images`. A mark `<image>` in the question is where a picture stands; a reward model that is
to see it wants a trainer of your own, which finds it in `images`."""

TRL_KTO = """\
```python
from datasets import load_dataset
from trl import KTOConfig, KTOTrainer

answers = load_dataset("{folder}")
trainer = KTOTrainer(
    model="{model}",
    args=KTOConfig(output_dir="kto", max_length=None),  # the default cuts image tokens off
    train_dataset=answers["train"],{test_argument}
)
trainer.train()
```

Of each question the best answers are labelled true and as many of the worst false (`--rank`), and
each that is true was scored higher than each that is false; where the two labels are not as many,
set `desirable_weight` and `undesirable_weight`."""

TRL_SFT = """\
```python
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

answers = load_dataset("{folder}")
trainer = SFTTrainer(
    model="{model}",
    args=SFTConfig(output_dir="sft", max_length=None),  # the default cuts image tokens off
    train_dataset=answers["train"],{test_argument}
)
trainer.train()
```

This is rejection sampling: of each question the best answers (`--best`) that are whole and no near
duplicates of better ones. The best of a question may still be a poor one: `score` tells."""

RANKED = """\
```python
from datasets import load_dataset

questions = load_dataset("{folder}")["train"]
for question in questions:
    best, *others = question["answers"]
```

Of an answer in `answers`, best first: `score` and `rank` (1 is the best, equal scores share it;
null where there is no score), `scores` (its components, as JSON), `unfit` (why `trl_kto` and
`trl_sft` leave it out: no score, empty, a near duplicate of a better one, a mark of a picture),
`model` (who wrote it; empty: sampled by this run), `given_as` (its side of a pair that the input
had made), `finish_reason` (`stop`, or `length`: cut off), `token_ids` (with the end token where
there is one), `token_logps` (of these, under the instruct model, untempered), `reward_token_logps`
(under the reward model, where the pipeline computes them), `ids_from_text` (whether the ids were
made from the text of an answer that the input brought). `stream-engine run --dataset_path {folder}`
scores these answers again."""

RLAIFV = """\
```bash
deepspeed ./muffin/train/train_llava15.py --deepspeed ./script/zero2.json \\
    --model_name_or_path {model} --data_dir {folder} --image_folder not_used \\
    --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu \\
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False \\
    --fully_tune True --image_aspect_ratio pad --bf16 True --tf32 True \\
    --gradient_checkpointing True --model_max_length 2048 --lazy_preprocess True \\
    --data_source_names '' --data_source_weights 1 --task DPO --dpo_beta 0.1 \\
    --dpo_use_average False --dpo_token_weighted False --dpo_token_weight 1.0 \\
    --learning_rate 5e-7 --per_device_train_batch_size 1 --num_train_epochs 1 --output_dir dpo
```

is RLAIF-V's own line, in a checkout of it; tests read this folder with its dataset class, not with
its trainer. That trainer has no term for the likelihood of the chosen answer: keep the learning
rate low, or train on the format `trl`.

{loss}

The column `logps` holds the reference model's log-probs, so the trainer skips its own pass; the
empty file `train-logps.parquet` is how it knows. Keep both: without the column the trainer stops
with `KeyError: 'logps'`, and without the file it fetches `openbmb/RLAIF-V-Dataset` from the hub and
scores that instead.

`logps` is `{{"logps": [chosen sum, chosen mean, chosen per token, rejected sum, rejected mean,
rejected per token]}}`: of the instruct model's untempered distribution, over the answer's tokens
and the end token where the model generated it. The lists per token cover prompt and answer: entry t
belongs to token t + 1, and prompt positions are 0. An answer that was cut off has no end token,
while the trainer appends one: where such pairs are many (see below), run again with a larger
`--max_new_tokens`.

The log-probs are of the picture as the model saw it when it answered: LLaVA models see it padded to
a square, while RLAIF-V's `train_llava15.py` crops it. Where pictures are not square, let its
`image_processor` pad them too (`expand2square` with the mean colour), or the reference's log-probs
and the policy's are of two pictures."""

USAGE = {
    "rlaifv": RLAIFV,
    "trl": TRL,
    "trl_reward": TRL_REWARD,
    "trl_kto": TRL_KTO,
    "trl_sft": TRL_SFT,
    "ranked": RANKED,
    "ms_swift": MS_SWIFT,
    "ms_swift_jsonl": MS_SWIFT.replace("\nswift", "\nROOT_IMAGE_DIR={folder} swift"),
    "llama_factory": LLAMA_FACTORY,
    "llama_factory_jsonl": LLAMA_FACTORY,
}


def usage(format: str, files: Mapping[str, Sequence[str]]) -> str:
    """How to train on a dataset of this format, whose rows are in `files` by their split."""
    train, test = (
        " ".join(f"{FOLDER}/{file}" for file in files.get(split, ())) for split in ("train", "test")
    )
    loaded = "answers" if format in ("trl_kto", "trl_sft") else "pairs"
    return USAGE[format].format(
        folder=FOLDER,
        model=MODEL,
        reward_model=REWARD_MODEL,
        loss=LOSS,
        media=f"media_dir: {FOLDER}\n" if format.endswith("_jsonl") else "",
        train_files=train,
        test_files=f"    --val_dataset {test} \\\n" if test else "",
        test_argument=f'\n    eval_dataset={loaded}["test"],' if test else "",
        test_dataset="eval_dataset: stream_engine_test\n" if test else "",
    )
