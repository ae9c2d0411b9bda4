"""Fused generation and scoring over shared prefixes, for any loaded model.

Knows no pipeline and no file. Open engine.py first (what it offers), then scheduler.py.
"""

from stream_engine.engine.engine import Engine, load_engine, share_device
from stream_engine.engine.requests import (
    GeneratedRow,
    GenerateRequest,
    Generation,
    NextTokenLogps,
    RequestFailure,
    RowRequest,
    ScoredContinuations,
    ScoreRequest,
)
from stream_engine.engine.sampling import ResolvedSampling, resolve_sampling, row_seed

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
