"""What a card says of training is run as it stands: two steps of each trainer, by its own command.

Of the card's text only the folder and the model are replaced, and the number of steps, the device
and the model's template are set behind it. ms-swift and LLaMA-Factory are named by a variable each;
without it their tests are skipped. `bash tests/outputs/trainers/environments.sh FOLDER` makes both
environments and prints the variables.

    MS_SWIFT_PYTHON          an interpreter with ms-swift
    LLAMA_FACTORY_PYTHON     an interpreter with llamafactory
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stream_engine.config import RunConfig
from stream_engine.outputs.formats import RANKINGS
from stream_engine.outputs.usage import FOLDER, MODEL, REWARD_MODEL
from stream_engine.pairs.ranked import write_ranking
from stream_engine.run_dir.paths import RunDir
from tests.outputs.qwen_checkpoint import FIRST_SPECIAL, SPECIALS, write_qwen
from tests.outputs.test_trl import VOCABULARY, save_tiny_llava, tiny_configs
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    run_merge,
    synthetic_sample,
    write_run,
)

LOSS = re.compile(r"'(?:loss|train_loss)': '?([\d.]+)")
ON_CPU = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
TRL_ON_CPU = """\
import functools, trl
for name in ("DPOConfig", "KTOConfig", "SFTConfig", "RewardConfig"):
    config = functools.partial(
        getattr(trl, name), max_steps=2, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", per_device_train_batch_size=2, logging_steps=1,
    )
    setattr(trl, name, config)
"""
PLAIN_TEMPLATE = """\
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }} </s> {% endfor -%}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen") / "model")


def dataset_of(name: str, folder: Path) -> Path:
    """A dataset of both splits, of questions with none, one and two pictures."""
    run_dir = RunDir(folder / "run")
    samples = [synthetic_sample(i, num_images=(1, 0, 2, 1)[i % 4]) for i in range(8)]
    write_run(run_dir, samples, num_words=8)
    if name in RANKINGS:
        config = RunConfig(test_fraction=0.4)
        pipeline = SyntheticPipeline(config)
        return Path(write_ranking(run_dir, config, pipeline, FINGERPRINTS, format=name).folder)
    return Path(run_merge(run_dir, format=(name,), test_fraction=0.4).dataset)


def command_of(dataset: Path, model: Path) -> str:
    """The block of code under the card's "Use", for this folder and this model."""
    card = (dataset / "README.md").read_text()
    use = card[card.index("## Use") : card.index("## How it was made")]
    (block,) = re.findall(r"```\w+\n(.*?)\n```", use, re.DOTALL)
    for name in (MODEL, REWARD_MODEL):
        block = block.replace(name, str(model))
    return block.replace(FOLDER, str(dataset))


def interpreter(variable: str) -> Path:
    """The interpreter that a variable names; its environment's commands lie beside it."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter")
    return Path(python)


def run_words(words: list[str], folder: Path, python: Path) -> str:
    """The output of a trainer's command, run in a folder of its own."""
    environment = os.environ | ON_CPU | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def check_losses(output: str, *, num_words: int = FIRST_SPECIAL + len(SPECIALS)) -> None:
    """Two steps were taken, by DPO's loss and the chosen answers' likelihood: a random model of
    that many words begins at log 2 and log of their number."""
    losses = [float(loss) for loss in LOSS.findall(output)]
    assert len(losses) >= 3, output[-3000:]  # of each step, and of both
    assert losses[0] == pytest.approx(math.log(2) + math.log(num_words), abs=0.2)


@pytest.mark.parametrize("name", ["ms_swift", "ms_swift_jsonl"])
def test_ms_swift_takes_two_steps_by_the_cards_command(
    name: str, model: Path, tmp_path: Path
) -> None:
    python = interpreter("MS_SWIFT_PYTHON")
    command = command_of(dataset_of(name, tmp_path), model)
    steps = "--max_steps 2 --logging_steps 1 --report_to none"
    here = "--template qwen2_5_vl --torch_dtype float32 --gradient_accumulation_steps 1"
    check_losses(run_words(["bash", "-c", f"{command} {steps} {here}"], tmp_path, python))


@pytest.mark.parametrize("name", ["llama_factory", "llama_factory_jsonl"])
def test_llama_factory_takes_two_steps_by_the_cards_configuration(
    name: str, model: Path, tmp_path: Path
) -> None:
    python = interpreter("LLAMA_FACTORY_PYTHON")
    (tmp_path / "dpo.yaml").write_text(command_of(dataset_of(name, tmp_path), model))
    steps = ["max_steps=2", "logging_steps=1", "report_to=none", "bf16=false"]
    words = ["llamafactory-cli", "train", "dpo.yaml", *steps]
    check_losses(run_words(words, tmp_path, python))


def test_trl_takes_two_steps_by_the_cards_program(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    save_tiny_llava(tmp_path / "llava")  # Qwen's processor would need torchvision here
    program = TRL_ON_CPU + command_of(dataset_of("trl", tmp_path), tmp_path / "llava")
    (tmp_path / "train.py").write_text(program)
    output = run_words([sys.executable, "train.py"], tmp_path, Path(sys.executable))
    check_losses(output, num_words=len(VOCABULARY))


def save_tiny_language_model(llava: Path, folder: Path) -> None:
    """A language model of a few thousand random parameters, for plain texts."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(llava)
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(tiny_configs(len(VOCABULARY))["text_config"]).save_pretrained(folder)


def test_trl_takes_two_steps_on_answers_and_on_pairs_for_a_reward_model(tmp_path: Path) -> None:
    """Each by its card's program: KTO begins at a loss of 1/2, SFT at log of the number of words,
    a reward model at log 2."""
    pytest.importorskip("trl")
    llava, language_model = tmp_path / "llava", tmp_path / "language_model"
    save_tiny_llava(llava)
    save_tiny_language_model(llava, language_model)
    names = ("trl_kto", "trl_sft", "trl_reward")
    programs = [
        command_of(
            dataset_of(name, tmp_path / name), language_model if name == "trl_reward" else llava
        )
        for name in names
    ]
    (tmp_path / "train.py").write_text(TRL_ON_CPU + "\nprint('NEXT')\n".join(programs))
    output = run_words([sys.executable, "train.py"], tmp_path, Path(sys.executable))
    losses = [[float(loss) for loss in LOSS.findall(part)] for part in output.split("NEXT")]
    assert [len(found) for found in losses] == [3, 3, 3], output[-3000:]
    assert losses[0][0] == pytest.approx(0.5, abs=0.05)
    assert losses[1][0] == pytest.approx(math.log(len(VOCABULARY)), abs=0.2)
    assert losses[2][0] == pytest.approx(math.log(2), abs=0.1)
