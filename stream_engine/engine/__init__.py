"""Fused generation and scoring over shared prefixes, for any loaded model.

Knows no pipeline and no file. Open engine.py first (what it offers), then scheduler.py. A name is
imported when it is asked for, since memory.py and sampling.py, which plan a run, need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

HOMES = {
    "Engine": "engine",
    "load_engine": "engine",
    "share_device": "engine",
    "GenerateRequest": "requests",
    "GeneratedRow": "requests",
    "Generation": "requests",
    "NextTokenLogps": "requests",
    "RequestFailure": "requests",
    "RowRequest": "requests",
    "ScoreRequest": "requests",
    "ScoredContinuations": "requests",
    "ResolvedSampling": "sampling",
    "resolve_sampling": "sampling",
    "row_seed": "sampling",
}

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


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
