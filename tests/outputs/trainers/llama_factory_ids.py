"""Run by LLaMA-Factory's own interpreter: the prompt ids that it makes of each row for DPO.

python llama_factory_ids.py CHECKPOINT DATASET_FOLDER  ->  "IDS" and a JSON list of ids a line
"""

import json
import sys
import tempfile

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

checkpoint, folder = sys.argv[1:3]
model_args, data_args, training_args, _, _ = get_train_args(
    {
        "model_name_or_path": checkpoint,
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "stream_engine",
        "dataset_dir": folder,
        "media_dir": folder,
        "template": "qwen2_vl",
        "cutoff_len": 4096,
        "output_dir": tempfile.mkdtemp(),
        "overwrite_cache": True,
        "report_to": "none",
        "bf16": False,
    }
)
parts = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(parts["tokenizer"], data_args)
module = get_dataset(template, model_args, data_args, training_args, stage="rm", **parts)
for row in module["train_dataset"]:
    ids, labels = row["chosen_input_ids"], row["chosen_labels"]
    print("IDS", json.dumps([i for i, label in zip(ids, labels) if label == -100]))
