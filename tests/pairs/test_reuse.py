"""Appends leave parts as they are where no filter decides anew: copied, and equal to made ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stream_engine.outputs.formats.base import PairRow
from stream_engine.outputs.published import RECORD
from stream_engine.pairs.reuse import ROWS_MADE_BY
from stream_engine.pairs.rows import RowMaker
from stream_engine.records import Sample
from stream_engine.run_dir.paths import RunDir
from tests.synthetic import bytes_of, run_merge, synthetic_sample, write_run

NUM_BEFORE, NUM_MORE = 96, 8
SMALL_PARTS: dict[str, Any] = {"max_part_bytes": 26_000, "max_length_bias": 1000.0}
FORMATS = ["trl", "rlaifv", "llama_factory", "ms_swift"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples whose rows were made, by number, as they are."""
    samples: list[int] = []
    make = RowMaker.row

    def noted(self: RowMaker, sample: Sample, *others: Any) -> PairRow:
        samples.append(int(sample.idx.removeprefix("idx-")))
        return make(self, sample, *others)

    monkeypatch.setattr(RowMaker, "row", noted)
    return samples


def grown(folder: Path, steps: list[int], **settings: Any) -> RunDir:
    """A run that is merged after each append, the last of which leads to so many samples."""
    run_dir, first = RunDir(folder), 0
    for end in steps:
        write_run(run_dir, map(synthetic_sample, range(first, end)), sample_k=4)
        run_merge(run_dir, **settings)
        first = end
    return run_dir


def append(run_dir: RunDir, **settings: Any) -> None:
    """NUM_MORE samples more, and a merge."""
    more = range(NUM_BEFORE, NUM_BEFORE + NUM_MORE)
    write_run(run_dir, map(synthetic_sample, more), sample_k=4)
    run_merge(run_dir, **settings)


def record_of(run_dir: RunDir) -> dict[str, Any]:
    return json.loads((Path(str(run_dir.dataset_dir)) / RECORD).read_text())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("test_fraction", [0.0, 0.4])
def test_an_append_makes_the_last_rows_alone_and_the_same_dataset(
    tmp_path: Path, made: list[int], format: str, test_fraction: float
) -> None:
    settings = SMALL_PARTS | {"format": format, "test_fraction": test_fraction}
    whole = grown(tmp_path / "whole", [NUM_BEFORE + NUM_MORE], **settings)
    num_rows = record_of(whole)["pairs"]["written"]
    assert len(made) == num_rows
    run_dir = grown(tmp_path / "appended", [NUM_BEFORE], **settings)
    before = record_of(run_dir)
    made.clear()
    append(run_dir, **settings)
    assert bytes_of(Path(str(run_dir.dataset_dir))) == bytes_of(Path(str(whole.dataset_dir)))
    num_kept = 0
    for split in before["splits"]:
        of_split = [part for part in before["parts"] if part["name"].startswith(split)]
        num_kept += sum(part["rows"] for part in of_split[:-1])
    assert num_kept > 20
    assert min(made) < 8  # the first shard's, for the card's example
    assert num_rows - num_kept <= len(made) <= num_rows - num_kept + 2 * 8


@pytest.mark.parametrize("bias", [-1.0, 0.0, 0.25])
def test_where_the_balance_decides_anew_rows_are_made_again(tmp_path: Path, bias: float) -> None:
    settings = {"max_part_bytes": 20_000, "max_length_bias": bias}
    whole = grown(tmp_path / "whole", [80], **settings)
    steps = grown(tmp_path / "steps", [16, 24, 56, 64, 80], **settings)
    assert record_of(steps)["pairs"]["dropped"].get("length_balance", 0) > 0
    assert bytes_of(Path(str(steps.dataset_dir))) == bytes_of(Path(str(whole.dataset_dir)))


def test_a_part_that_is_not_what_was_written_is_made_again(
    tmp_path: Path, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    whole = grown(tmp_path / "whole", [NUM_BEFORE + NUM_MORE], **SMALL_PARTS)
    run_dir = grown(tmp_path / "run", [NUM_BEFORE], **SMALL_PARTS)
    part = Path(str(run_dir.dataset_dir)) / record_of(run_dir)["parts"][1]["name"]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    made.clear()
    append(run_dir, **SMALL_PARTS)
    assert f"{part.name} is not what was written" in caplog.text
    assert bytes_of(Path(str(run_dir.dataset_dir))) == bytes_of(Path(str(whole.dataset_dir)))
    kept = record_of(whole)["parts"][0]["rows"]
    num_written = record_of(whole)["pairs"]["written"]
    assert num_written - kept <= len(made) <= num_written - kept + 2 * 8


def test_other_settings_keep_no_part(tmp_path: Path, made: list[int]) -> None:
    run_dir = grown(tmp_path / "run", [NUM_BEFORE], **SMALL_PARTS)
    made.clear()
    run_merge(run_dir, **SMALL_PARTS | {"max_part_bytes": 25_000})
    assert len(made) == record_of(run_dir)["pairs"]["written"]


def test_where_a_format_refuses_pairs_no_part_is_kept(tmp_path: Path, made: list[int]) -> None:
    """How many it refused of them could not be told."""
    settings = SMALL_PARTS | {"format": "rlaifv"}
    run_dir = RunDir(tmp_path / "run")
    samples = [synthetic_sample(i, num_images=2 if i == 3 else 1) for i in range(NUM_BEFORE)]
    write_run(run_dir, samples, sample_k=4)
    run_merge(run_dir, **settings)
    record = record_of(run_dir)
    assert record["pairs"]["dropped"]["needs_one_image"] > 0 and record[ROWS_MADE_BY] == ""
    made.clear()
    append(run_dir, **settings)
    record = record_of(run_dir)["pairs"]
    assert len(made) == record["written"] + record["dropped"]["needs_one_image"]
