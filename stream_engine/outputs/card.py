"""The dataset card: README.md beside the parts, for people and for `datasets.load_dataset`.

Everything in it comes from the settings, from stats.json and from the parts, so that equal datasets
have equal cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from stream_engine.config import ModelConfig, RankingConfig, RunConfig, SamplingConfig

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}

USAGE = {
    "rlaifv": """\
```python
from datasets import load_dataset

pairs = load_dataset("path/to/this/folder")["train"]
```

RLAIF-V's trainer: `--data_dir path/to/this/folder`. The column `logps` holds the reference
model's log-probs, so the trainer skips its own pass; the empty file `train-logps.parquet` is how
it knows. `logps` is `{"logps": [chosen sum, chosen mean, chosen per token, rejected sum, rejected
mean, rejected per token]}`: of the instruct model's untempered distribution, over the answer's
tokens and the end token where the model generated it. The lists per token cover prompt and answer:
entry t belongs to token t + 1, and prompt positions are 0. An answer that was cut off has no end
token, while the trainer appends one: drop `logps` if such pairs (see below) are many.

The log-probs are of the picture as the model saw it when it answered: LLaVA models see it padded to
a square, while RLAIF-V's `train_llava15.py` crops it. Where pictures are not square, let its
`image_processor` pad them too (`expand2square` with the mean colour), or the reference's log-probs
and the policy's are of two pictures.
""",
    "trl": """\
```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

pairs = load_dataset("path/to/this/folder")["train"]
# max_length=None: the default cuts image tokens off
args = DPOConfig(output_dir="dpo", max_length=None)
DPOTrainer(model="your/instruct-model", args=args, train_dataset=pairs).train()
```
""",
    "ms_swift": """\
```bash
ROOT_IMAGE_DIR=path/to/this/folder swift rlhf --rlhf_type dpo --dataset \\
    path/to/this/folder/train.jsonl --model your/instruct-model
```

ms-swift's own template for LLaVA-1.5 has no system prompt and breaks the line before `ASSISTANT:`:
it trains on other words than the model was asked. Qwen2.5-VL's is the one that was asked.
""",
    "llama_factory": """\
In the training YAML: `dataset_dir: path/to/this/folder`, `media_dir: path/to/this/folder`,
`dataset: stream_engine`, `stage: dpo`.

`template: llava` says "a curious user" where LLaVA-1.5 was asked as "a curious human"; `qwen2_vl`
is the prompt that Qwen2.5-VL was asked.
""",
}


def dataset_card(
    config: RunConfig,
    stats: Mapping[str, Any],
    *,
    data_files: str,
    content: str,
    resolved_sampling: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md.

    Args:
        stats: the content of stats.json.
        data_files: which files of the folder hold the rows.
        content: their hash, from `published.content_hash`.
        resolved_sampling: the sampling values that the engine used, where they are known.
    """
    sampling = {**msgspec.to_builtins(config.part(SamplingConfig)), **(resolved_sampling or {})}
    models = msgspec.to_builtins(config.part(ModelConfig))
    sections = [
        front_matter(stats["pairs"]["written"], data_files, content),
        "# Preference pairs\n\n"
        f"{stats['pairs']['written']} pairs (question, images, chosen and rejected answer) made "
        f"by stream_engine's pipeline `{stats['pipeline']}` for direct preference "
        "optimization (DPO) of a vision-language model.",
        "## Use\n\n" + USAGE[stats["format"]].rstrip(),
        "## How it was made",
        table(
            "model",
            {name: models[name] for name in models if name.endswith("_path") and models[name]},
        ),
        table("sampling", sampling),
        table("selection", msgspec.to_builtins(config.part(RankingConfig))),
        "## Counts",
        counts(stats),
        "## Bias\n\n" + bias(stats),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(num_pairs: int, data_files: str, content: str) -> str:
    """The YAML that the Hub and `load_dataset` read.

    `load_dataset` caches a dataset under a hash of these lines, and sees of the files no more than
    the pattern: the description is what tells the datasets of two runs apart there.
    """
    size = next((name for limit, name in SIZES.items() if num_pairs < limit), "n>1M")
    return f"""\
---
configs:
- config_name: default
  description: "content {content}"
  data_files:
  - split: train
    path: "{data_files}"
size_categories:
- {size}
task_categories:
- visual-question-answering
tags:
- dpo
- preference
- stream_engine
---"""


def counts(stats: Mapping[str, Any]) -> str:
    """Where every sample and every candidate pair went."""
    samples, pairs, answers = stats["samples"], stats["pairs"], stats["answers"]
    rows = {
        "samples": samples["total"],
        **{
            f"... with {k} picture{'' if k == '1' else 's'}": count
            for k, count in samples.get("with_images", {}).items()
        },
        "... scored": samples["scored"],
        **{f"... set aside ({stage})": n for stage, n in samples["quarantined"].items()},
        "... in shards without results": samples["missing"],
        "... with candidate pairs": samples["with_candidates"],
        "... with pairs in this dataset": samples["with_pairs"],
        "records refused at input": samples["rejected"],
        "answers": answers["total"],
        **{f"... finished by {why}": n for why, n in answers["finish_reasons"].items()},
        **{f"... not scored ({why})": n for why, n in answers["unscored"].items()},
        "candidate pairs": pairs["candidates"],
        **{f"... dropped: {why}": n for why, n in pairs["dropped"].items()},
        "... written": pairs["written"],
    }
    return table("count of", rows)


def bias(stats: Mapping[str, Any]) -> str:
    """What a trainer may learn besides quality."""
    words, margin = stats["words"], stats["margin"]
    before, after = stats["length_wins_before_balance"], stats["length_wins"]
    rows: dict[str, Any] = {
        "mean words chosen": words["chosen"]["mean"],
        "mean words rejected": words["rejected"]["mean"],
        "longer answer chosen, of pairs of unequal length": after["rate"],
        "... before length balance": before["rate"],
        "mean margin of the scores": margin["mean"],
        "cut-off answers among the chosen": stats["pair_finish_reasons"].get("chosen_length", 0),
        "cut-off answers among the rejected": stats["pair_finish_reasons"].get(
            "rejected_length", 0
        ),
        **{f"judge: {name}": rate for name, rate in stats["judge"]["rates"].items()},
        **{f"judge: {name}": count for name, count in stats["judge"]["counts"].items()},
    }
    return (
        "Judges favour longer answers; half of the pairs of unequal length should be won by the "
        "longer one.\n\n" + table("measure", rows)
    )


def table(heading: str, rows: Mapping[str, Any]) -> str:
    """A two-column Markdown table; empty when there are no rows."""
    if not rows:
        return ""
    lines = [f"| {heading} | |", "| --- | --- |"]
    lines += [f"| {name} | {shown(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as a table cell."""
    if value is None:
        return "-"
    return str(value).replace("|", "\\|").replace("\n", " ")
