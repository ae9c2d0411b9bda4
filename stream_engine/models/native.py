"""Checkpoints that transformers itself can load: strictly, and with errors in one line.

`load_native` is for models whose stored names only transformers can map (it renames and merges
tensors on load); families with formats of their own use `checkpoints.load_into`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_accelerate_available
from transformers.utils import logging as hf_logging

from stream_engine.config import ModelConfig
from stream_engine.device_errors import is_device_lost, is_out_of_memory
from stream_engine.errors import CheckpointError
from stream_engine.models.base import VisionLanguageModel
from stream_engine.models.checkpoints import resolve_device, resolve_dtype
from stream_engine.models.intact import read_json
from stream_engine.models.weight_files import WeightFiles
from stream_engine.text import describe

CAUSAL_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose past is keys and values, which the engine's attention can share."""

SHORT_WINDOW = 2000
"""Tokens; about the longest picture, question and answer together."""

logger = logging.getLogger(__name__)

# What transformers raises for a checkpoint that is not what its class expects.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,  # of values of config.json
    TemplateError,
)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
QUESTION = "THE QUESTION"
"""What a chat template is tried with."""
MIN_VOCABULARY = 300
"""Tokens; transformers makes a tokenizer of a few from no file at all."""


def load_native(auto_class: Any, checkpoint: Path, config: ModelConfig) -> PreTrainedModel:
    """A model of `auto_class` with every tensor of the checkpoint used and none missing.

    Remote code is never run. Attention is "sdpa" where the architecture allows it.

    Raises:
        CheckpointError: for broken files, missing, unexpected or misshapen tensors.
    """
    weights = WeightFiles(checkpoint)  # reads every file's table of contents, and refuses pickles
    stated = read_json(checkpoint / "config.json")
    if not stated.get("quantization_config") and not (dtype := weights.dtype()).is_floating_point:
        raise CheckpointError(
            f"{checkpoint}: the weights are quantised (they are {dtype}) and config.json says not "
            "how; give the folder of the unquantised checkpoint"
        )
    device = resolve_device(config)
    straight = device.type != "cpu" and is_accelerate_available()
    try:
        with _quiet():
            model, report = auto_class.from_pretrained(
                checkpoint,
                dtype=resolve_dtype(config, stated, weights),
                device_map={"": device} if straight else None,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
            )
    except LOAD_ERRORS as error:
        raise CheckpointError(f"cannot load {checkpoint}: {one_line(error)}") from error
    for what, names in (
        ("lacks", report["missing_keys"]),
        ("has unexpected", report["unexpected_keys"]),
        ("has misshapen", [name for name, *_ in report["mismatched_keys"]]),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            noun = "tensor" if len(names) == 1 else "tensors"
            raise CheckpointError(f"{checkpoint} {what} {len(names)} {noun}: {shown}")
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def naming(say: Callable[[BaseException], str]) -> Iterator[None]:
    """A CheckpointError of what libraries raise of a checkpoint's files, or its own code.

    Running out of memory and a lost device stay what they are.
    """
    try:
        yield
    except LOAD_ERRORS as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        raise CheckpointError(say(error)) from error


def naming_checkpoint(checkpoint: Path) -> AbstractContextManager[None]:
    """The loading of a checkpoint: what is raised becomes a CheckpointError with its folder."""
    return naming(lambda error: f"cannot load {checkpoint}: {described(error)}")


def naming_architecture(checkpoint: Path, own: torch.nn.Module) -> AbstractContextManager[None]:
    """First forwards: what a model's own code raises becomes a CheckpointError with its class."""
    return naming(
        lambda error: (
            f"{checkpoint}: {type(own).__name__} cannot be run on a few tokens "
            f"({type(error).__name__}: {one_line(error)}); this architecture is not supported"
        )
    )


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError."""
    has_file = any((checkpoint / name).is_file() for name in TOKENIZER_FILES)
    lacks = f"{checkpoint} has none of {', '.join(TOKENIZER_FILES)}; download its tokenizer too"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=False
        )
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"cannot load the tokenizer of {checkpoint}: {described(error)}" if has_file else lacks
        ) from error
    if not has_file and len(tokenizer) < MIN_VOCABULARY:
        raise CheckpointError(lacks)
    check_length(checkpoint, tokenizer)
    return tokenizer


def check_length(checkpoint: Path, tokenizer: Any) -> None:
    """Raise CheckpointError where model_max_length, which every text is held against, is none."""
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise CheckpointError(
            f"{checkpoint / 'tokenizer_config.json'}: model_max_length is {length!r}, not a "
            "number; correct it or take the line out"
        )


def check_template(checkpoint: Path, rendered: str) -> None:
    """Raise CheckpointError where a chat template, here of QUESTION, does not give the user's text
    as it is: it leaves it out, or writes a list of parts as Python does."""
    if QUESTION not in rendered or f"'{QUESTION}'" in rendered:
        raise CheckpointError(
            f"{checkpoint}: its chat template makes {rendered[:200]!r} of {QUESTION!r}, which is "
            "not what a user says; give the model's own chat_template.jinja"
        )


def logit_rules(text: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, soft cap) that an architecture puts on its logits, by the names in its config.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma caps.
    """
    scale = getattr(text, "logit_scale", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    return scale, getattr(text, "final_logit_softcapping", None)


def has_shareable_layers(text: PreTrainedConfig) -> bool:
    """Whether every layer's past is keys and values that a question's answers can share.

    A sliding window counts as unlimited from SHORT_WINDOW on: the engine refuses the questions
    that exceed it. Below, the model's own cache is the way.
    """
    layers = getattr(text, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    window = getattr(text, "sliding_window", None) if slides else None
    return set(layers or ()) <= CAUSAL_LAYERS and (window is None or window >= SHORT_WINDOW)


def end_token_ids(tokenizer: Any, text: PreTrainedConfig) -> frozenset[int]:
    """End tokens of tokenizer and language model; generation_config.json's join them later."""
    stated = getattr(text, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return frozenset(i for i in ids if i is not None)


@torch.no_grad()
def adopt_own_logits(model: VisionLanguageModel, own: PreTrainedModel) -> None:
    """Set the logit rules under which `forward` and the head give what the model's class computes.

    They are the configuration's, or none: some wrappers of transformers leave their language
    model's rule out, and then generate without it. This follows them, with a warning.

    Raises:
        CheckpointError: when the architecture does to logits or embeddings what is not known here.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (7,), generator=generator)
    for placeholder in model.suppressed_token_ids:
        ids[ids == placeholder] = 0
    ids = ids.to(model.device)
    with naming_architecture(model.checkpoint, own):
        expected = own(input_ids=ids[None], use_cache=False).logits[0].float()
        hidden = model.forward(model.embed(ids), torch.arange(len(ids), device=model.device))
        plain = model.lm_head(hidden).float()
    stated = logit_rules(own.config.get_text_config())
    differences = []
    for scale, softcap in (stated, (1.0, None)):
        logits = plain * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        difference = (logits - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
        if difference <= (1e-3 if model.dtype == torch.float32 else 5e-2):
            model.logit_scale, model.logit_softcap = scale, softcap
            if (scale, softcap) != stated:
                logger.warning(
                    "%s: config.json states logit scale %g and soft cap %s, but %s applies neither",
                    model.checkpoint,
                    *stated,
                    type(own).__name__,
                )
            return
        differences.append(f"{difference:.2g}")
    raise CheckpointError(
        f"{model.checkpoint}: {type(own).__name__} changes its logits or embeddings in a way that "
        f"is not supported (relative difference {' or '.join(differences)})"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and tables: what matters is raised."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def described(error: BaseException) -> str:
    """An error with its type, cut where it is long."""
    return describe(error)[:300]


def one_line(error: BaseException) -> str:
    """The first line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
