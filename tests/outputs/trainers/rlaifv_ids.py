"""The prompt ids that RLAIF-V's dataset class and preprocessing make of each row, for LLaVA-1.5.

    python rlaifv_ids.py CHECKOUT CHECKPOINT DATASET_FOLDER  ->  "IDS" and a JSON list of ids a line

CHECKOUT is a clone of RLHF-V/RLAIF-V. What its modules import for training alone is left out.
"""

import json
import sys
import types
from functools import partial

checkout, checkpoint, folder = sys.argv[1:4]
sys.path.insert(0, checkout)
unused = types.ModuleType("muffin.eval.muffin_inference_logp")
unused.inference_logp = None
sys.modules["muffin.eval"] = types.ModuleType("muffin.eval")
sys.modules["muffin.eval.muffin_inference_logp"] = unused
package = types.ModuleType("muffin.train")
package.__path__ = [f"{checkout}/muffin/train"]
sys.modules["muffin.train"] = package

import muffin.conversation  # noqa: E402
from muffin.data.datasets import RLAIFVDataset  # noqa: E402
from muffin.train.train_utils import (  # noqa: E402
    encode_multimodal_preference_sample,
    preprocess_v1,
)

from stream_engine.config import ModelConfig  # noqa: E402
from stream_engine.models import load_model  # noqa: E402

templates = muffin.conversation.conv_templates
muffin.conversation.default_conversation = templates["llava_v1"]  # the trainer's own default
model = load_model(checkpoint, ModelConfig(device="cpu"))
pictures = {
    "is_multimodal": True,
    "keep_image_tag": True,
    "image_token_len": 0,
    "image_processor": lambda image: image,
}
for sample in RLAIFVDataset(folder):
    _, chosen = encode_multimodal_preference_sample(
        sample, model.tokenizer, pictures, preprocess_func=partial(preprocess_v1, has_image=True)
    )
    ids, labels = chosen["input_ids"].tolist(), chosen["labels"].tolist()
    prompt = [i for i, label in zip(ids, labels) if label == -100]
    print("IDS", sample["idx"], json.dumps(prompt))
