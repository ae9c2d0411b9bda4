from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stream_engine.demo.data import write_dataset
from stream_engine.demo.world import make_picture
from stream_engine.errors import ConfigError


def test_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a.parquet", 30, 4).read_bytes()
    assert first == write_dataset(tmp_path / "b" / "b.parquet", 30, 4).read_bytes()
    assert first != write_dataset(tmp_path / "c.parquet", 30, 5).read_bytes()


def test_rows_are_the_input_format_of_the_engine(tmp_path: Path) -> None:
    table = pq.read_table(write_dataset(tmp_path / "a.parquet", 1003, 4))
    assert table.column_names == ["idx", "question", "image"]
    assert len(set(table["idx"].to_pylist())) == 1003
    picture = make_picture(4, 1002)
    row = table.slice(1002).to_pylist()[0]
    assert row["idx"] == picture.idx
    assert row["question"] == picture.question
    assert row["image"]["bytes"] == picture.png


def test_a_larger_count_only_adds_rows(tmp_path: Path) -> None:
    small = pq.read_table(write_dataset(tmp_path / "a.parquet", 10, 4)).to_pylist()
    large = pq.read_table(write_dataset(tmp_path / "b.parquet", 25, 4)).to_pylist()
    assert large[:10] == small


def test_no_unfinished_file_is_left(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.parquet", 3, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("count", "seed", "format"), [(0, 0, "parquet"), (1, -1, "parquet"), (1, 0, "csv")]
)
def test_impossible_wishes_are_refused(tmp_path: Path, count: int, seed: int, format: str) -> None:
    with pytest.raises(ConfigError):
        write_dataset(tmp_path / "a", count, seed, format=format)


def test_a_file_being_written_is_known_as_temporary(tmp_path, monkeypatch):
    """Two workers began a demo run at once: one took the other's half-written file for a
    stranger's and refused the folder."""
    from stream_engine.demo import data
    from stream_engine.store.local import is_temporary

    seen = []
    make = data._row

    def row(seed, number):
        seen.extend(path for path in tmp_path.iterdir())
        return make(seed, number)

    monkeypatch.setattr(data, "_row", row)
    data.write_dataset(tmp_path / "questions.parquet", 2, 0)
    assert seen
    assert all(is_temporary(path) for path in seen)
