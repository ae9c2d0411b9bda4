"""Every format reads back as the pairs that were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream_engine.errors import ConfigError
from stream_engine.outputs.formats import EXPORTS
from stream_engine.outputs.reading import read_pairs
from tests.outputs.exported import export, pair_rows


@pytest.mark.parametrize("name", list(EXPORTS))
def test_a_dataset_reads_back_as_its_pairs(name: str, tmp_path: Path) -> None:
    rows = pair_rows(2)
    if name != "rlaifv":
        rows += pair_rows(1, num_images=2, question="Is <image> older than <image>?")
        rows += pair_rows(1, num_images=0)
    export(name, tmp_path, rows)
    found = sorted(read_pairs(tmp_path), key=lambda pair: (pair.question, pair.chosen))
    expected = sorted(rows, key=lambda row: (row.sample.question, row.chosen.text))
    assert [pair.question for pair in found] == [row.sample.question for row in expected]
    for pair, row in zip(found, expected):
        assert (pair.chosen, pair.rejected) == (row.chosen.text, row.rejected.text)
        assert [i.data for i in pair.images] == [i.data for i in row.sample.images]
        assert (pair.idx, pair.margin) == (row.sample.idx, 3.5)


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no dataset"):
        list(read_pairs(tmp_path))
