"""Fused generation and log-probs over shared prefixes. The engine knows nothing of pipelines."""

from stream_engine.engine.engine import Engine, load_engine, share_device
from stream_engine.engine.generate import (
    GeneratedRow,
    GenerateRequest,
    Generation,
    RequestFailure,
    RowRequest,
)
from stream_engine.engine.sampling import ResolvedSampling, resolve_sampling, row_seed
from stream_engine.engine.score import NextTokenLogps, ScoredContinuations, ScoreRequest

__all__ = [
    "Engine",
    "GenerateRequest",
    "GeneratedRow",
    "Generation",
    "NextTokenLogps",
    "RequestFailure",
    "ResolvedSampling",
    "RowRequest",
    "ScoreRequest",
    "ScoredContinuations",
    "load_engine",
    "resolve_sampling",
    "row_seed",
    "share_device",
]
