"""validate: silent about good data, precise about bad data."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_engine.outputs.formats import EXPORTS
from stream_engine.outputs.validate import validate
from stream_engine.run_dir.paths import RunDir
from tests.conftest import rows_file
from tests.synthetic import run_merge, synthetic_sample, write_run


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with every format, one sample of which has two images and one none."""
    run_dir = RunDir(tmp_path_factory.mktemp("good") / "run")
    write_run(run_dir, [synthetic_sample(i, num_images=(1, 1, 2, 0)[i]) for i in range(4)])
    run_merge(run_dir, format=tuple(EXPORTS))
    return run_dir


@pytest.fixture
def run_dir(good_run: RunDir, tmp_path: Path) -> RunDir:
    """A copy to break."""
    shutil.copytree(good_run.root, tmp_path / "run")
    return RunDir(tmp_path / "run")


def folder_of(run_dir: RunDir, name: str) -> Path:
    return run_dir.dataset_folders(list(EXPORTS))[name]


def test_what_a_merge_writes_has_no_problems(good_run: RunDir) -> None:
    assert validate(good_run.root) == []
    for name in EXPORTS:
        assert validate(folder_of(good_run, name)) == []
    assert validate(rows_file(good_run.dataset_dir)) == []


def row_problems(folder: Path) -> list[str]:
    """The problems of the rows, which a test has rewritten: the files are told, too."""
    return [p for p in validate(folder) if not p.endswith(("was written", "were written"))]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first row of a parquet dataset; the rest stays."""
    path = rows_file(folder)
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


TRL_FAULTS = {
    "images is null": lambda row: row.update(images=None),
    "1 image parts in the prompt, 0 images": lambda row: row.update(images=[]),
    "image: undecodable_image": lambda row: row["images"][0].update(bytes=b"no image"),
    "chosen has the role 'bot'": lambda row: row["chosen"][0].update(role="bot"),
    "question holds a literal <image>": lambda row: row["prompt"][0]["content"][1].update(
        text="<image> what?"
    ),
    "rejected is empty": lambda row: row["rejected"][0]["content"][0].update(text=" "),
    "chosen and rejected are the same": lambda row: row.update(rejected=row["chosen"]),
    "not of the expected shape": lambda row: row.update(prompt=None),
}
RLAIFV_FAULTS = {
    "idx is null": lambda row: row.update(idx=None),
    "no image bytes": lambda row: row.update(image=None),
    "image: ": lambda row: row["image"].update(bytes=row["image"]["bytes"][:60]),
    "chosen is empty": lambda row: row.update(chosen="\u200b "),
    "chosen and rejected are the same": lambda row: row.update(rejected=row["chosen"] + "\u200b"),
    "logps holds 2 values, not 6": lambda row: row.update(logps='{"logps": [-1, -1]}'),
    "logps holds values that are no log-probs": lambda row: row.update(
        logps='{"logps": [-1, -1, [null], -1, -1, [-1]]}'
    ),
    "not of the expected shape": lambda row: row.update(logps="{not json"),
}


@pytest.mark.parametrize("problem", TRL_FAULTS)
def test_a_bad_trl_row_is_named(run_dir: RunDir, problem: str) -> None:
    rewrite(folder_of(run_dir, "trl"), TRL_FAULTS[problem])
    (found,) = row_problems(folder_of(run_dir, "trl"))
    assert f"{rows_file(folder_of(run_dir, 'trl'))}, row 0: " in found
    assert problem in found


@pytest.mark.parametrize("problem", RLAIFV_FAULTS)
def test_a_bad_rlaifv_row_is_named(run_dir: RunDir, problem: str) -> None:
    rewrite(run_dir.dataset_dir, RLAIFV_FAULTS[problem])
    (found,) = row_problems(run_dir.dataset_dir)
    assert f"{rows_file(run_dir.dataset_dir)}, row 0: " in found
    assert problem in found


def change_jsonl(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = rows_file(folder)
    first, *others = path.read_text().splitlines()
    row = json.loads(first)
    change(row)
    path.write_text("\n".join([json.dumps(row), *others]) + "\n")


@pytest.mark.parametrize(
    ("name", "problem", "change"),
    [
        pytest.param(
            "ms_swift_jsonl",
            "2 image marks in the prompt, 1 images",
            lambda row: row["messages"][0].update(content="<image><image>what?"),
            id="marks",
        ),
        pytest.param(
            "ms_swift_jsonl",
            "No such file",
            lambda row: row.update(images=["images/none.png"]),
            id="missing-image",
        ),
        pytest.param(
            "llama_factory_jsonl",
            "turns are from human, bot, gpt",
            lambda row: row["chosen"].update({"from": "bot"}),
            id="roles",
        ),
        pytest.param(
            "llama_factory_jsonl",
            "not of the expected shape",
            lambda row: row.pop("rejected"),
            id="missing-key",
        ),
    ],
)
def test_a_bad_jsonl_row_is_named(
    run_dir: RunDir, name: str, problem: str, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = folder_of(run_dir, name)
    change_jsonl(folder, change)
    found, *_ = row_problems(folder)
    assert f"{rows_file(folder)}, row 0: " in found
    assert problem in found


@pytest.mark.parametrize("name", ["ms_swift_jsonl", "llama_factory_jsonl"])
def test_a_row_with_images_after_one_without_is_a_problem_where_none_leads(
    run_dir: RunDir, name: str
) -> None:
    """`datasets` then types the column by rows without images, if there are enough of these."""
    folder = folder_of(run_dir, name)
    lines = rows_file(folder).read_text().splitlines()
    lines.sort(key=lambda line: len(json.loads(line)["images"]))
    assert json.loads(lines[0])["images"] == []
    rows_file(folder).write_text("\n".join(lines) + "\n")
    (found,) = row_problems(folder)
    assert "the first row with images is not the first of all" in found


def test_parquet_without_image_metadata_is_a_problem(run_dir: RunDir) -> None:
    """As pandas writes it: images would load as dicts, and TRL refuse them."""
    path = rows_file(folder_of(run_dir, "trl"))
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    (found,) = row_problems(path.parent)
    assert "they load as dicts" in found


def test_missing_reserved_and_mistyped_columns_are_problems(run_dir: RunDir) -> None:
    path = rows_file(folder_of(run_dir, "trl"))
    table = pq.read_table(path)
    table = table.drop_columns(["images", "margin"])
    table = table.append_column("label", pa.array([1] * table.num_rows))
    position = table.column_names.index("idx")
    table = table.set_column(position, "idx", pa.array(range(table.num_rows)))
    pq.write_table(table, path)
    found = "\n".join(row_problems(path.parent))
    assert "column 'images' is missing" in found
    assert "margin" not in found, "a column that a trainer does not need"
    assert "column 'label' makes TRL" in found
    assert "column 'idx' is int64, not string" in found


def test_lost_rows_and_torn_parts_are_problems(run_dir: RunDir) -> None:
    path = rows_file(run_dir.dataset_dir)
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    (found,) = row_problems(run_dir.dataset_dir)
    assert f"{table.num_rows - 1} rows, stats.json says {table.num_rows}" in found
    path.write_bytes(path.read_bytes()[:-100])
    assert any("cannot be read: " in problem for problem in row_problems(run_dir.dataset_dir))


def test_rows_from_elsewhere_in_a_dataset_are_named(run_dir: RunDir) -> None:
    shutil.copy(rows_file(run_dir.dataset_dir), run_dir.dataset_dir / "train-more.parquet")
    (run_dir.dataset_dir / "notes.txt").write_text("mine")
    (problem,) = validate(run_dir.root)
    assert "train-more.parquet: is not of this dataset" in problem


def test_a_dataset_of_another_format_than_the_settings_ask_for_is_named(run_dir: RunDir) -> None:
    shutil.rmtree(run_dir.export_dir("trl"))
    run_dir.run_json.write_text(json.dumps({"settings": {"format": ["ms_swift", "trl"]}}))
    first, second = validate(run_dir.root)
    assert first.startswith(f"{run_dir.dataset_dir}: holds rlaifv, the settings ask for ms_swift")
    assert second.startswith(f"{run_dir.export_dir('trl')}: is not there")


def test_a_run_without_a_dataset_says_so(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    write_run(run_dir, [synthetic_sample(0)])
    assert validate(tmp_path) == [f"{tmp_path}: the run has no dataset yet"]


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "file", "damage", "says"),
    [
        ("trl", "rows", zeros, "its content is not what was written"),
        ("llama_factory", "dataset_info.json", Path.unlink, "is lost"),
        ("llama_factory", "rows", zeros, "its content is not what"),
        ("llama_factory_jsonl", "images", shutil.rmtree, "is lost"),
        ("ms_swift_jsonl", "rows", lambda path: path.write_text(""), "is lost"),
        ("rlaifv", "README.md", Path.unlink, "is lost"),
        ("rlaifv", "stats.json", Path.unlink, "is lost; the next merge makes"),
        ("rlaifv", "stats.json", zeros, "is not what was written; the next merge makes"),
    ],
)
def test_a_damaged_or_lost_file_is_named_and_the_next_merge_mends_it(
    run_dir: RunDir, name: str, file: str, damage: Callable[[Path], object], says: str
) -> None:
    """Zeros over a parquet file, or a lost dataset_info.json, passed as "ok", and a run left them.
    A lost stats.json made each later merge refuse its own folder."""
    folder = run_dir.dataset_dir if name == "rlaifv" else run_dir.export_dir(name)
    time.sleep(0.01)  # the record is older than what is written now
    path = rows_file(folder) if file == "rows" else folder / file
    damage(path)
    assert any(f"{path}" in p and says in p for p in validate(folder)), validate(folder)
    run_merge(run_dir, format=tuple(EXPORTS))
    assert validate(folder) == []


def make_unreadable(path: Path) -> None:
    """A folder in a file's place: it is there, and cannot be read, whoever asks."""
    path.unlink()
    path.mkdir()
    (path / "inner").write_text("inner")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, f) for name in ("rlaifv", "ms_swift_jsonl") for f in ("stats.json", "README.md")),
        *(("rlaifv", "rows"), ("ms_swift_jsonl", "rows"), ("ms_swift_jsonl", "images/*.png")),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_looked_at(
    run_dir: RunDir, name: str, file: str
) -> None:
    """One such file ended the whole check of a run, stats.json the first."""
    folder = folder_of(run_dir, name)
    path = rows_file(folder) if file == "rows" else min(folder.glob(file))
    make_unreadable(path)
    assert f"{path}: cannot be read: Is a directory" in validate(folder)
    other = folder_of(run_dir, "trl")
    rewrite(other, TRL_FAULTS["rejected is empty"])
    problems = validate(run_dir.root)
    assert any("rejected is empty" in problem for problem in problems)
    assert f"{path}: cannot be read: Is a directory" in problems


def test_a_record_nested_too_deep_is_not_what_was_written(run_dir: RunDir) -> None:
    record = run_dir.stats_json
    record.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    (problem,) = validate(run_dir.dataset_dir)
    assert problem.startswith(f"{record}: is not what was written")


def test_one_changed_byte_anywhere_in_a_dataset_is_told(run_dir: RunDir) -> None:
    folder, rng = run_dir.dataset_dir, random.Random(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(10):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            assert validate(folder), path
        path.write_bytes(whole)
    assert validate(folder) == []
