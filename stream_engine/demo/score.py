"""Measure the pairs of a finished demo run against the truth of the world."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from stream_engine.demo.facts import count_wrong_facts
from stream_engine.demo.world import scene_of
from stream_engine.errors import ConfigError

_COLUMNS = ["idx", "question", "chosen", "rejected"]


def score_pairs(work_dir: Path) -> dict[str, float]:
    """How often the chosen answer is the truer one, over ``work_dir/dataset/*.parquet``.

    Keys: `pairs`; `pair_accuracy`, the share of pairs whose chosen answer has fewer wrong facts
    than the rejected one, a draw counting half; `wrong_facts_chosen` and `wrong_facts_rejected`,
    means per pair. Without pairs the last three are 0. The truth is drawn again from each `idx`;
    ConfigError for rows that the demo world did not make, or where there is no dataset.
    """
    files = sorted((work_dir / "dataset").glob("*.parquet"))
    if not files:
        raise ConfigError(f"{work_dir / 'dataset'} holds no parquet file; has the run been merged?")
    pairs, won, wrong_chosen, wrong_rejected = 0, 0.0, 0, 0
    for file in files:
        with pq.ParquetFile(file) as parquet:
            # A part without rows has no row group either, which older pyarrow cannot iterate over.
            batches = parquet.iter_batches(columns=_COLUMNS) if parquet.num_row_groups else ()
            for batch in batches:
                for row in batch.to_pylist():
                    scene = scene_of(row["idx"])
                    chosen = count_wrong_facts(scene, row["question"], row["chosen"])
                    rejected = count_wrong_facts(scene, row["question"], row["rejected"])
                    pairs += 1
                    won += 1.0 if chosen < rejected else 0.5 if chosen == rejected else 0.0
                    wrong_chosen += chosen
                    wrong_rejected += rejected
    return {
        "pairs": pairs,
        "pair_accuracy": won / max(1, pairs),
        "wrong_facts_chosen": wrong_chosen / max(1, pairs),
        "wrong_facts_rejected": wrong_rejected / max(1, pairs),
    }
