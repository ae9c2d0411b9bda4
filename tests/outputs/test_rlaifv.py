"""RLAIF-V's trainer on a real run's dataset: what its loader and collator do, step by step."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from stream_engine.records import SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results


def test_rlaifv_trainer_reads_a_real_runs_dataset(demo_run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data_dir = demo_run / "dataset"
    # The loader scores a dataset of its own unless a parquet file's name has `logp` in it.
    assert [name for name in os.listdir(data_dir) if name.endswith(".parquet") and "logp" in name]
    data = datasets.load_dataset(str(data_dir), cache_dir=str(tmp_path))["train"]
    data = data.cast_column("image", datasets.Image(decode=False))
    run_dir = RunDir(demo_run)
    answers = {}
    for info in Manifest.load(run_dir).shards:
        for record in read_results(run_dir.result("rollouts", info.index), SampleRollouts):
            idx = info.ids[info.keys.index(record.key)]
            answers |= {(idx, answer.text): (record, answer) for answer in record.answers}
    assert len(data) > 0
    for row in data:
        assert Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").size[0] > 1
        assert isinstance(row["idx"], str)
        (win, win_avg, win_list, rej, rej_avg, rej_list) = json.loads(row["logps"])["logps"]
        for text, total, mean, per_token in (
            (row["chosen"], win, win_avg, win_list),
            (row["rejected"], rej, rej_avg, rej_list),
        ):
            record, answer = answers[row["idx"], text]
            num_labels = len(answer.token_ids) + 1  # the collator appends an end token
            assert record.num_prompt_tokens > 10
            assert len(per_token) == record.num_prompt_tokens + num_labels - 1
            # the loss masks everything before the answer
            assert sum(per_token[-num_labels:]) == pytest.approx(total, abs=1e-4)
            assert total < 0 and mean == pytest.approx(total / len(answer.scored_ids))
