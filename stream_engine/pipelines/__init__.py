"""The pipelines by name. A new one is one file here and one line in PIPELINES.

Third parties add theirs, a `stream_engine.pipelines.base.Pipeline`, through an entry point:

    [project.entry-points."stream_engine.pipelines"]
    longer_is_better = "acme_pipeline:LongerIsBetter"
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from stream_engine.errors import ConfigError
from stream_engine.extensions import installed
from stream_engine.text import nearest

if TYPE_CHECKING:
    from stream_engine.pipelines.base import Pipeline

PIPELINES = {
    "dpo_reward": "stream_engine.pipelines.dpo_reward:DPORewardPipeline",
    "divide_and_conquer": "stream_engine.pipelines.divide_and_conquer:DivideAndConquerPipeline",
    "llava_critic": "stream_engine.pipelines.llava_critic:LlavaCriticPipeline",
}


def known_pipelines() -> dict[str, str]:
    """Name -> "module:class" of every pipeline, third parties' included."""
    return PIPELINES | installed("stream_engine.pipelines") | PIPELINES


def pipeline_class(name: str) -> type[Pipeline]:
    """The pipeline of that name; importing it does not import torch.

    Raises:
        ConfigError: for an unknown name, with the known ones.
    """
    known = known_pipelines()
    if name not in known:
        raise ConfigError(
            f"unknown pipeline {name!r}{nearest(name, list(known))}; "
            f"choose from {', '.join(sorted(known))}"
        )
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
