"""Run by ms-swift's own interpreter: the prompt ids that its template makes of each row.

python ms_swift_ids.py CHECKPOINT DATASET_FOLDER  ->  one JSON list of ids a line
"""

import json
import sys
from pathlib import Path

from swift.dataset import load_dataset
from swift.model import get_processor
from swift.template import get_template

checkpoint, folder = sys.argv[1], Path(sys.argv[2])
processor = get_processor(checkpoint, model_type="qwen2_5_vl")
template = get_template(processor, template_type="qwen2_5_vl")
template.set_mode("rlhf")
files = [str(path) for path in sorted(folder.glob("train-*.parquet"))]
rows, _ = load_dataset(files)
for row in rows:
    encoded = template.encode(row)
    ids, labels = encoded["chosen_input_ids"], encoded["chosen_labels"]
    print("IDS", json.dumps([i for i, label in zip(ids, labels) if label == -100]))
