"""Run by ms-swift's own interpreter: the prompt ids that its template makes of each row.

python ms_swift_ids.py CHECKPOINT DATASET_FOLDER  ->  one JSON list of ids a line
"""

import json
import sys
from pathlib import Path

from swift.model import get_processor
from swift.template import get_template

checkpoint, folder = sys.argv[1], Path(sys.argv[2])
processor = get_processor(checkpoint, model_type="qwen2_5_vl")
template = get_template(processor, template_type="qwen2_5_vl")
template.set_mode("rlhf")
for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    row["images"] = [str(folder / image) for image in row.get("images", [])]
    encoded = template.encode(row)
    ids, labels = encoded["chosen_input_ids"], encoded["chosen_labels"]
    print("IDS", json.dumps([i for i, label in zip(ids, labels) if label == -100]))
