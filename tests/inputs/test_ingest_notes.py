"""What ingest tells of an input beside its samples: rows gone, pictures changed, none at all."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from stream_engine.config import InputConfig
from stream_engine.errors import NoPicturesError
from stream_engine.inputs.ingest import ingest, note_lines
from stream_engine.run_dir.manifest import Manifest, count_pictures
from stream_engine.run_dir.paths import RunDir
from tests.inputs.ingested import CONFIG, counts, ids_of, numbers, quarantined
from tests.samples import make_row, picture, write_jsonl, write_parquet


def test_rows_that_are_gone_stay_in_the_run_and_are_counted(run_dir: RunDir, tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(0, 4))
    ingest(run_dir, [str(path)], CONFIG)
    assert Manifest.load(run_dir).inputs[str(path)].notes == {}
    write_jsonl(path, [make_row(1), {**make_row(2), "question": "edited?"}, make_row(9)])
    assert counts(ingest(run_dir, [str(path)], CONFIG)) == (3, 1, 1, {"changed_row": 1})
    assert ids_of(run_dir) == ["0", "1", "2", "3", "9"]
    assert Manifest.load(run_dir).inputs[str(path)].notes == {"gone": 2}
    (failure,) = quarantined(run_dir)
    assert "has changed since it was read" in failure.detail


def test_a_carried_column_that_changed_is_told_and_keeps_its_first_reading(
    run_dir: RunDir, tmp_path: Path
):
    """It was neither taken nor told."""
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "ds_name": "old"} for row in numbers(0, 3)])
    ingest(run_dir, [str(path)], CONFIG)
    changed = [{**make_row(1), "ds_name": "new"}, {**make_row(2), "metainfos": '{"a": 1}'}]
    write_jsonl(path, [{**make_row(0), "ds_name": "old"}, *changed, make_row(3)])
    other = write_jsonl(tmp_path / "b.jsonl", [{**make_row(0), "ds_name": "other"}])
    report = ingest(run_dir, [str(path), str(other)], CONFIG)
    assert counts(report) == (5, 1, 4, {})
    inputs = Manifest.load(run_dir).inputs
    assert [inputs[str(one)].notes for one in (path, other)] == [{"carried": 2}, {"carried": 1}]
    (line,) = note_lines(inputs[str(path)].notes, inputs[str(path)].examples)
    assert line.startswith("2 rows of samples") and line.endswith("the first is id '1'")


def test_what_was_done_to_rows_and_how_many_pictures_they_have_is_kept(
    run_dir: RunDir, tmp_path: Path
):
    glass = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 9)).save(glass, "PNG")
    two = {"question": "?", "images": [{"bytes": glass.getvalue()}, {"bytes": picture(2)}]}
    path = write_parquet(tmp_path / "a.parquet", [two, {"question": "Why?", "images": []}])
    ingest(run_dir, [str(path)], InputConfig(samples_per_shard=2, text_only="allow"))
    manifest = Manifest.load(run_dir)
    assert manifest.inputs[str(path)].notes == {"transparency": 1}
    assert count_pictures(shard.images for shard in manifest.shards) == {0: 1, 2: 1}


def test_an_input_without_any_picture_is_refused_before_it_is_remembered(
    run_dir: RunDir, tmp_path: Path
):
    rows = [{"idx": i, "query": "Why?", "question": "?", "img": "a.png"} for i in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = InputConfig(samples_per_shard=2)
    with pytest.raises(NoPicturesError, match=r"Columns: idx, query, question, img; .*--columns"):
        ingest(run_dir, [str(path)], config)
    assert Manifest.load(run_dir).inputs == {}
    rows[250]["image"] = base64.b64encode(picture(1)).decode()
    with pytest.raises(NoPicturesError):  # after 200 rows it is plain
        ingest(run_dir, [str(write_jsonl(path, rows))], config)
    report = ingest(run_dir, [str(write_jsonl(path, rows[200:]))], config)
    assert (report.added, report.rejected) == (1, {"no_image": 99})
