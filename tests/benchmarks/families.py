"""Where the time of a question goes in each family: picture, tower, projector, prefill, decode.

    python -m tests.benchmarks families [--rounds 5] [--threads 2] [--out FILE]

The models are random, each an eighth as wide as the published one and a quarter as deep, tower and
language model alike, so that their shares are about the published ones'; pictures, patches and
tokens of a picture are as published. A question is one picture of 640 x 480, ten answers of 50
tokens, and the scoring of these by a second pass of the same model. Counted: passes of the tower
and pictures in them, which must be one a question and model.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor, nn

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.engine import (
    Engine,
    GenerateRequest,
    RowRequest,
    ScoreRequest,
    load_engine,
    row_seed,
)
from tests.benchmarks.harness import Results, clock
from tests.models import (
    hf_architectures,
    writers_hf,
    writers_llava,
    writers_llava_onevision,
    writers_minicpm_v,
    writers_omnilmm,
)
from tests.models.writers_parts import Language, Vit

ANSWERS, TOKENS = 10, 50
LONG = {"max_position_embeddings": 16384, "tokenizer_model_max_length": 16384}
PARTS = ("picture", "tower", "projector", "prefill", "decode", "scoring")
Seconds = dict[str, float]


def llava(folder: Path) -> Path:
    """LLaVA-1.5: 576 tokens a picture."""
    shape = writers_llava.Shape(
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=8,
        mlp=1376,
        vision_hidden=128,
        vision_layers=6,
        vision_heads=4,
        vision_mlp=512,
        image=336,
    )
    weights = writers_llava.random_weights(shape)
    return writers_llava.write_original(folder / "model", weights, tower="inside", **LONG)


def omnilmm(folder: Path) -> Path:
    """OmniLMM: 1024 patches, 64 tokens."""
    language = Language(hidden=512, vocab=481, heads=8, kv_heads=2, layers=8, mlp=1792)
    shape = writers_omnilmm.Shape(
        language, queries=64, image=448, width=224, heads=4, blocks=16, mlp=1920, table_side=16
    )
    tensors = writers_omnilmm.random_weights(shape)
    return writers_omnilmm.write(folder / "model", shape, tensors, **LONG)


def minicpm_v(folder: Path) -> Path:
    """MiniCPM-V 2.6: slices of about 1024 patches, 64 tokens each."""
    language = Language(
        hidden=512, vocab=481, heads=8, kv_heads=2, layers=7, mlp=2368, qkv_bias=True
    )
    tower = Vit(width=144, layers=7, heads=4, mlp=538, image=980, patch=14)
    shape = writers_minicpm_v.Shape("2.6", language, tower, queries=64, scale=448, max_slices=9)
    tensors = writers_minicpm_v.random_weights(shape)
    return writers_minicpm_v.write(folder / "model", shape, tensors, **LONG)


def llava_onevision(folder: Path) -> Path:
    """LLaVA-Critic: up to ten views of 729 patches and tokens."""
    language = Language(
        hidden=448, vocab=483, heads=7, kv_heads=1, layers=7, mlp=2368, qkv_bias=True
    )
    tower = Vit(width=144, layers=6, heads=4, mlp=538, image=384, patch=14)
    pinpoints = tuple((384 * w, 384 * h) for w in range(1, 7) for h in range(1, 7))
    shape = writers_llava_onevision.Shape(
        language, tower, aspect="anyres_max_9", pinpoints=pinpoints
    )
    tensors = writers_llava_onevision.random_weights(shape)
    return writers_llava_onevision.write(folder / "model", shape, tensors, **LONG)


def hf_vlm(folder: Path) -> Path:
    """Qwen2.5-VL, by transformers' own code: 391 tokens of this picture."""
    small = hf_architectures.ARCHITECTURES["qwen2_5_vl"]
    vision = small.vision | {
        "depth": 8,
        "hidden_size": 160,
        "intermediate_size": 428,
        "num_heads": 4,
        "out_hidden_size": 448,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3, 5, 7],
    }
    text = small.text | {
        "hidden_size": 448,
        "intermediate_size": 2368,
        "num_hidden_layers": 7,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [8, 12, 12],
        },
    }
    pixels = hf_architectures.pil(
        "Qwen2VLImageProcessorPil", min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 1280
    )
    name = "qwen2_5_vl_eighth"
    hf_architectures.ARCHITECTURES[name] = dataclasses.replace(
        small, image_processor=pixels, text=text, vision=vision
    )
    return writers_hf.write_hf(folder / "model", name)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    write.__name__: write for write in (llava, omnilmm, minicpm_v, llava_onevision, hf_vlm)
}


def families(rounds: int, keep: Callable[[Results], None]) -> Results:
    """Seconds and shares of every family; `keep` gets the results so far after each."""
    results: Results = {"rounds": rounds}
    for name, write in FAMILIES.items():
        results[name] = family(write, rounds, TOKENS)
        keep(results)
    return results


def family(write: Callable[[Path], Path], rounds: int, tokens: int) -> Results:
    """Medians of the rounds, after one to warm up."""
    with TemporaryDirectory() as folder:
        role = ModelRole("model", str(write(Path(folder))), "rollouts")
        sampling = SamplingConfig(temperature=0.7, max_new_tokens=tokens)
        engine = load_engine(role, ModelConfig(device="cpu", dtype="float32"), sampling)
        picture = Image.effect_noise((640, 480), 60).convert("RGB")
        taken: list[Seconds] = []
        for number in range(rounds + 1):
            with watching(engine) as (seconds, passes):
                length = ask(engine, picture, seconds, number)
            taken.append(seconds)
    medians = {part: statistics.median(each[part] for each in taken[1:]) for part in PARTS}
    total = sum(medians.values())
    return {
        "prompt_tokens": length,
        "tower_passes": passes["tower"],
        "seconds": {part: round(each, 4) for part, each in medians.items()},
        "share": {part: round(each / total, 3) for part, each in medians.items()},
    }


def ask(engine: Engine, picture: Image.Image, seconds: Seconds, number: int) -> int:
    """One question through the engine; the length of its prompt."""
    started = now()
    prompt = engine.model.prompt(f"What is seen in picture {number}?", [picture])
    seconds["picture"] = now() - started
    rows = tuple(RowRequest(row_seed(number, "0", j)) for j in range(ANSWERS))
    started = now()
    [generated] = list(engine.generate([GenerateRequest("0", prompt, rows)]))
    inside = sum(seconds.get(part, 0.0) for part in ("tower", "projector", "prefill"))
    seconds["decode"] = now() - started - inside
    answers = tuple(tuple(row.token_ids) for row in generated.rows if row.token_ids)
    before = dict(seconds)
    started = now()
    list(engine.score([ScoreRequest("0", prompt, answers)]))
    seconds["scoring"] = now() - started
    seconds.update({part: before.get(part, 0.0) for part in ("tower", "projector", "prefill")})
    return len(prompt)


@contextmanager
def watching(engine: Engine) -> Iterator[tuple[Seconds, Counter[str]]]:
    """Seconds in tower, projector and the rest of prefill, and how often each was run."""
    seconds: Seconds = {}
    passes: Counter[str] = Counter()
    tower, projector = modules(engine.model)
    own_prefill = engine.runner.prefill

    def prefill(*arguments: Any) -> Tensor:
        started, before = now(), sum(seconds.values())
        hidden = own_prefill(*arguments)
        inside = sum(seconds.values()) - before
        spent = now() - started - inside
        seconds["prefill"] = seconds.get("prefill", 0.0) + spent
        return hidden

    with ExitStack() as stack:
        for name, module in (("projector", projector), ("tower", tower)):
            stack.enter_context(timing(name, module, seconds, passes))
        engine.runner.prefill = prefill  # type: ignore[method-assign]
        stack.callback(setattr, engine.runner, "prefill", own_prefill)
        yield seconds, passes


@contextmanager
def timing(name: str, module: nn.Module, seconds: Seconds, passes: Counter[str]) -> Iterator[None]:
    """Add a module's seconds under a name, without those of a timed module inside."""
    open_calls: list[tuple[float, float]] = []

    def enter(*_: Any) -> None:
        open_calls.append((now(), sum(seconds.values())))

    def leave(*_: Any) -> None:
        started, before = open_calls.pop()
        inside = sum(seconds.values()) - before
        spent = now() - started - inside
        seconds[name] = seconds.get(name, 0.0) + spent
        passes[name] += 1

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    yield
    for handle in handles:
        handle.remove()


def now() -> float:
    """Seconds: the processor's where one thread does all the work."""
    return clock()()


def modules(model: Any) -> tuple[nn.Module, nn.Module]:
    """A model's tower, and what makes tokens of its output."""
    if hasattr(model, "wrapper"):
        visual = model.wrapper.model.visual
        return visual, visual.merger
    # some families run the tower's layers themselves
    tower = model.tower.encoder if hasattr(model, "tower_features") else model.tower
    return tower, model.projector if hasattr(model, "projector") else model.resampler
