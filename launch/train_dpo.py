"""python launch/train_dpo.py DATASET MODEL OUT [--learning_rate X] [--epochs N] [--max_steps N]

Trains a vision-language model of transformers on a dataset in format trl, by TRL's DPOTrainer, and
writes the checkpoint to OUT: what launch/train_in_rounds.sh runs between two rounds. An example, of
which to make your own: it needs `pip install trl`, and for several GPUs `accelerate launch` before
it. Started again with the same OUT it goes on from the last whole checkpoint in OUT/checkpoints;
a finished training is left as it is.

The loss is DPO's and the likelihood of the chosen answer (RPO), as the dataset's card advises.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Train, or go on, and leave nothing but the checkpoint in OUT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", help="a folder of format trl")
    parser.add_argument("model", help="a checkpoint folder, or a model of the hub")
    parser.add_argument("out", type=Path, help="where the trained checkpoint goes")
    parser.add_argument("--learning_rate", type=float, default=5e-7)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--save_steps", type=int, default=100)
    args = parser.parse_args()
    kept = args.out / "checkpoints"
    if (args.out / "config.json").exists() and not kept.exists():
        return
    trainer = DPOTrainer(
        model=args.model,
        args=DPOConfig(
            output_dir=str(kept),
            max_length=None,  # the default cuts image tokens off
            beta=0.5,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to=[],
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset(args.dataset)["train"],
    )
    step, last = last_checkpoint(kept)
    if last:
        print(f"{args.out}: going on from step {step}", file=sys.stderr, flush=True)
        restore(trainer, last)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(args.out))
    AutoProcessor.from_pretrained(args.model).save_pretrained(args.out)
    if trainer.is_world_process_zero():
        done = kept.rename(
            args.out / "checkpoints.done"
        )  # at once: what is left is not gone on from
        shutil.rmtree(done)


def restore(trainer: DPOTrainer, checkpoint: str) -> None:
    """Put a checkpoint's weights into the model.

    transformers 5 writes those of many vision-language models under other names than the modules
    have. Its Trainer finds none of them when it goes on, and does so with a warning, from the
    weights of the start; `from_pretrained` knows both.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return  # these keep parts of their own
    model = trainer.model
    weights = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    model.load_state_dict(weights)


def last_checkpoint(folder: Path) -> tuple[int, str | None]:
    """The newest whole checkpoint and its step: a kill may leave one without its state, which is
    written last, and transformers would not go on from that."""
    found: list[tuple[int, str | None]] = [(0, None)]
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        found.append((int(state["global_step"]), str(path)))
    return max(found, key=lambda one: one[0])


if __name__ == "__main__":
    main()
