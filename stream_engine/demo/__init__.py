"""The embedded default: a small world with known truth, and tiny models trained on it.

Whoever has no weights at hand runs all three pipelines for real on it, and measures the pairs
against the truth (:mod:`stream_engine.demo.score`). Importing this package loads no torch.
"""

from __future__ import annotations

from pathlib import Path

from stream_engine.errors import ConfigError

DEMO_COUNT = 300  # questions of the embedded data
DEMO_SEED = 7
CHECKPOINTS = ("instruct", "reward", "judge", "critic", "text")

# The reward models of each pipeline, in the order in which --reward_model_path names them.
_REWARD_MODELS = {
    "dpo_reward": ("reward",),
    "divide_and_conquer": ("judge", "text", "text"),  # auto-check, question change, split
    "llava_critic": ("critic",),
}


def checkpoint_path(name: str) -> Path:
    """The folder of a demo checkpoint; ConfigError for an unknown name."""
    if name not in CHECKPOINTS:
        raise ConfigError(f"unknown demo checkpoint {name!r}; choose from {', '.join(CHECKPOINTS)}")
    return Path(__file__).parent / "checkpoints" / name


def demo_models(pipeline_name: str) -> dict[str, str]:
    """The model settings that run a pipeline on the demo checkpoints."""
    if pipeline_name not in _REWARD_MODELS:
        known = ", ".join(_REWARD_MODELS)
        raise ConfigError(f"unknown pipeline {pipeline_name!r}; choose from {known}")
    rewards = (str(checkpoint_path(name)) for name in _REWARD_MODELS[pipeline_name])
    return {
        "instruct_model_path": str(checkpoint_path("instruct")),
        "reward_model_path": ",".join(rewards),
    }
