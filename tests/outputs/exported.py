"""Rows of pairs, and what a format makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stream_engine.outputs.formats import EXPORTS
from stream_engine.outputs.formats.base import (
    Export,
    PairRow,
)
from stream_engine.outputs.parquet import Part
from stream_engine.records import PreferencePair
from tests.synthetic import (
    synthetic_rollouts,
    synthetic_sample,
)


def pair_rows(num_samples: int, *, num_images: int = 1, **options: object) -> list[PairRow]:
    """Three rows a sample, as a merge hands them over."""
    rows = []
    for number in range(num_samples):
        sample = synthetic_sample(number, num_images=num_images, **options)
        rollouts = synthetic_rollouts(sample)
        for chosen, rejected in ((1, 8), (2, 9), (3, 7)):
            pair = PreferencePair(
                key=sample.key,
                chosen=chosen,
                rejected=rejected,
                chosen_score=2.5,
                rejected_score=-1.0,
            )
            rows.append(
                PairRow(
                    sample,
                    rollouts.answers[chosen],
                    rollouts.answers[rejected],
                    pair,
                    rollouts.num_prompt_tokens,
                )
            )
    return rows


def export(
    name: str, folder: Path, rows: list[PairRow], *, max_part_bytes: int = 400_000_000
) -> list[Part]:
    writer: Export = EXPORTS[name](folder, max_part_bytes=max_part_bytes)
    for row in rows:
        assert writer.write(row) is None
    parts = writer.close()
    writer.describe(lambda name: name)
    return parts


def first_row(folder: Path) -> dict[str, Any]:
    """Of a dataset as parquet or as JSON lines."""
    for part in folder.rglob("train-*-of-*.parquet"):
        return pq.read_table(part).to_pylist()[0]
    first, *_ = (folder / "train.jsonl").read_text().splitlines()
    return json.loads(first)


def load(folder: Path, tmp_path: Path, data_files: str) -> object:
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(
        "parquet", data_files=str(folder / data_files), cache_dir=str(tmp_path / "cache")
    )["train"]
