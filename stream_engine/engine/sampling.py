"""What is sampled how: settings resolved once, and the random number of each token.

Order of resolution for every value: the run's own setting, then the checkpoint's
generation_config.json, then the default below. The result is printed and stored, so that nothing
is inherited silently.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from stream_engine.config import SamplingConfig
from stream_engine.errors import CheckpointError

# top_k is transformers' default for sampling, which is what these checkpoints are used with.
DEFAULTS = {"top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "max_new_tokens": 512}


class ResolvedSampling(msgspec.Struct, frozen=True, kw_only=True):
    """Every value that shapes a sampled answer. `temperature == 0` is greedy; `top_k == 0` is off.

    `sources` says for each value whether it came from the run, the checkpoint or the default.
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int
    sources: dict[str, str] = {}


def resolve_sampling(config: SamplingConfig, checkpoint: dict[str, Any]) -> ResolvedSampling:
    """Merge the run's settings with a checkpoint's generation_config.json.

    Raises:
        CheckpointError: when the checkpoint's file asks for what is not supported (beam search).
    """
    if (checkpoint.get("num_beams") or 1) != 1:
        raise CheckpointError("generation_config.json asks for beam search; answers are sampled")
    values: dict[str, Any] = {"temperature": config.temperature}
    sources = {"temperature": "run"}
    for name, default in DEFAULTS.items():
        own, theirs = getattr(config, name), checkpoint.get(name)
        values[name] = own if own is not None else theirs if theirs is not None else default
        sources[name] = (
            "run" if own is not None else "checkpoint" if theirs is not None else "default"
        )
    return ResolvedSampling(**values, sources=sources)


def row_seed(seed: int, key: str, index: int) -> int:
    """The 63-bit seed of answer `index` to sample `key`: a hash of these three alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
