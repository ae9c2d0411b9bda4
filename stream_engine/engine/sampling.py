"""What is sampled how: settings resolved once, and the random number of each token.

Order of resolution for every value: the run's own setting, then the checkpoint's
generation_config.json, then the default below. A file that describes greedy decoding says nothing
of how to draw: its filters are not inherited by a run that does. The result is printed and stored,
so that nothing is inherited, or left out, silently.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgspec

from stream_engine.config import SamplingConfig
from stream_engine.errors import CheckpointError

# top_k is transformers' default for sampling, which is what these checkpoints are used with.
DEFAULTS = {"top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "max_new_tokens": 512}
FILTERS = ("top_p", "top_k")

UNSUPPORTED: dict[str, Any] = {
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": [],
    "top_h": 1.0,
    "typical_p": 1.0,
    "watermarking_config": None,
}
"""Fields of generation_config.json that shape answers, and the value beside null that does not."""

GREEDY_BELOW = 0.1
"""A top_p or temperature of which nothing but the likeliest token is left, in practice."""


class ResolvedSampling(msgspec.Struct, frozen=True, kw_only=True):
    """Every value that shapes a sampled answer. `temperature == 0` is greedy; `top_k == 0` is off.

    `sources` says for each value whether it came from the run, the checkpoint or the default;
    `notes` what of the checkpoint's file is not followed, and why.
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int
    sources: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def resolve_sampling(config: SamplingConfig, checkpoint: dict[str, Any]) -> ResolvedSampling:
    """Merge the run's settings with a checkpoint's generation_config.json.

    Raises:
        CheckpointError: when the checkpoint's file asks for what is not supported (beam search).
    """
    if (checkpoint.get("num_beams") or 1) != 1:
        raise CheckpointError("generation_config.json asks for beam search; answers are sampled")
    values: dict[str, Any] = {"temperature": config.temperature}
    sources = {"temperature": "run"}
    notes, left_out = _unsupported_notes(checkpoint), []
    greedy = _greedy_setting(checkpoint) if config.temperature > 0 else None
    for name, default in DEFAULTS.items():
        own, theirs = getattr(config, name), checkpoint.get(name)
        if own is not None:
            values[name], sources[name] = own, "run"
        elif theirs is None:
            values[name], sources[name] = default, "default"
        elif greedy and name in FILTERS:
            values[name] = default
            sources[name] = f"default (the checkpoint's {greedy} is greedy)"
            left_out.append(f"{name} {theirs}")
        else:
            is_used = config.temperature > 0 or name not in FILTERS
            values[name] = _stated(name, theirs) if is_used else theirs
            sources[name] = "checkpoint"
    if left_out:
        notes.append(
            f"generation_config.json describes greedy decoding ({greedy}), and this run draws; not "
            f"inherited: {', '.join(left_out)} (set them to have other than the defaults)"
        )
    return ResolvedSampling(**values, sources=sources, notes=tuple(notes))


def _stated(name: str, value: Any) -> Any:
    """A value of a generation_config.json, as this package has it.

    Raises:
        CheckpointError: for what is no such value.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = name in ("top_k", "max_new_tokens")
    if is_number and math.isfinite(value) and (not whole or value == int(value)):
        value = int(value) if whole else float(value)
        if name == "top_k" and value == -1:  # vLLM's way to say all
            return 0
        if {"top_p": 0 < value <= 1, "top_k": value >= 0}.get(name, value > 0):
            return value
    raise CheckpointError(
        f"generation_config.json: {name} is {value!r}, which it cannot be; correct it, or set "
        f"--{name}"
    )


def _unsupported_notes(checkpoint: dict[str, Any]) -> list[str]:
    """A sentence on the fields of a generation_config.json that shape answers, but not here."""
    stated = [n for n, neutral in UNSUPPORTED.items() if checkpoint.get(n) not in (None, neutral)]
    if not stated:
        return []
    names = ", ".join(stated)
    return [f"generation_config.json's {names}: not supported, answers are drawn without"]


def _greedy_setting(checkpoint: dict[str, Any]) -> str | None:
    """The setting by which a generation_config.json always takes the likeliest token, or None."""
    if checkpoint.get("do_sample") is False:
        return "do_sample false"
    if checkpoint.get("top_k") == 1:
        return "top_k 1"
    for name in ("top_p", "temperature"):
        value = checkpoint.get(name)
        if isinstance(value, int | float) and value < GREEDY_BELOW:
            return f"{name} {value:g}"
    return None


def row_seed(seed: int, key: str, index: int) -> int:
    """The 63-bit seed of answer `index` to sample `key`: a hash of these three alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
