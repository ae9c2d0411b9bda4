"""Exports: each trainer's schema to the letter, written as a stream in bounded parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from stream_engine.errors import ConfigError
from stream_engine.outputs.formats import EXPORTS, export_class
from stream_engine.outputs.formats.base import (
    SCORES,
    SPLITS,
    split_of,
)
from stream_engine.outputs.parquet import arrow_schema
from tests.outputs.exported import export, first_row, load, pair_rows
from tests.synthetic import (
    NUM_PROMPT_TOKENS,
    synthetic_sample,
)


def test_rlaifv_columns_are_in_order_and_of_the_right_type(tmp_path: Path) -> None:
    rows = pair_rows(1)
    parts = export("rlaifv", tmp_path / "d", rows)
    assert [part.name for part in parts] == ["train-00000-of-00001.parquet"]
    table = pq.read_table(tmp_path / "d" / parts[0].name)
    assert ", ".join(table.column_names) == (
        "ds_name, image, question, chosen, rejected, origin_dataset, origin_split, idx, "
        "image_path, logps, chosen_score, rejected_score, margin, round"
    )
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(table.schema.field("round").type) == "int64"
    others = [field for field in table.schema if field.name not in ("image", "round", *SCORES)]
    assert {str(field.type) for field in others} == {"string"}
    assert {str(table.schema.field(name).type) for name in SCORES} == {"double"}
    row = table.to_pylist()[0]
    assert row["image"]["bytes"] == rows[0].sample.images[0].data
    assert (row["ds_name"], row["idx"]) == ("stream_engine", "idx-0")
    assert (row["chosen"], row["rejected"]) == (rows[0].chosen.text, rows[0].rejected.text)


def test_rlaifv_loads_as_images_in_datasets(tmp_path: Path) -> None:
    rows = pair_rows(2)
    export("rlaifv", tmp_path / "d", rows)
    dataset = load(tmp_path / "d", tmp_path, "*.parquet")
    assert isinstance(dataset[0]["image"], Image.Image)
    assert dataset["chosen"][:] == [row.chosen.text for row in rows]


def test_trl_loads_as_images_in_datasets(tmp_path: Path) -> None:
    export("trl", tmp_path / "d", [*pair_rows(1), *pair_rows(1, num_images=0)])
    dataset = load(tmp_path / "d", tmp_path, "train-*-of-*.parquet")
    assert isinstance(dataset[0]["images"][0], Image.Image)
    assert dataset[3]["images"] == []
    assert [part["type"] for part in dataset[0]["prompt"][0]["content"]] == ["image", "text"]


PARQUET = ["rlaifv", "trl", "trl_reward", "ms_swift", "llama_factory"]


@pytest.mark.parametrize("name", PARQUET)
def test_schema_is_the_one_that_datasets_itself_would_write(name: str) -> None:
    datasets = pytest.importorskip("datasets")
    ours = arrow_schema(EXPORTS[name].features)
    theirs = datasets.Features.from_arrow_schema(ours)
    assert theirs.arrow_schema.remove_metadata() == ours.remove_metadata()
    image = theirs["image"] if name == "rlaifv" else theirs["images"].feature
    assert image == datasets.Image()


def test_rlaifv_logps_are_what_the_trainer_unpacks(tmp_path: Path) -> None:
    """Sum, mean and list of both answers; the lists cover the prompt as the trainer's own do."""
    row = pair_rows(1)[1]  # its rejected answer was cut: no end token
    assert (row.chosen.finish_reason, row.rejected.finish_reason) == ("stop", "length")
    parts = export("rlaifv", tmp_path, [row])
    (stored,) = pq.read_table(tmp_path / parts[0].name, columns=["logps"]).to_pylist()
    win, win_avg, win_list, rej, rej_avg, rej_list = json.loads(stored["logps"])["logps"]
    for answer, total, mean, per_token in (
        (row.chosen, win, win_avg, win_list),
        (row.rejected, rej, rej_avg, rej_list),
    ):
        num_answer = len(answer.token_ids) + (answer.finish_reason == "stop")
        assert total == pytest.approx(sum(answer.scored_logps))
        assert mean == pytest.approx(total / num_answer)
        # the trainer's input is prompt, answer and an end token that it appends by itself;
        # it wants an entry for each of these tokens but the first
        num_trainer_tokens = NUM_PROMPT_TOKENS + len(answer.token_ids) + 1
        assert len(per_token) == num_trainer_tokens - 1
        assert per_token[: NUM_PROMPT_TOKENS - 1] == [0.0] * (NUM_PROMPT_TOKENS - 1)
        assert sum(per_token) == pytest.approx(total, abs=1e-4)
        assert per_token[NUM_PROMPT_TOKENS - 1] == pytest.approx(answer.token_logps[0], abs=1e-6)


def test_rlaifv_folder_has_a_file_name_that_lets_the_trainer_use_the_logps(tmp_path: Path) -> None:
    """The trainer looks for `logp` in a parquet file's name, else scores another dataset."""
    export("rlaifv", tmp_path, pair_rows(2))
    names = sorted(path.name for path in tmp_path.iterdir())
    marker = [name for name in names if "logp" in name]
    assert len(marker) == 1 and marker[0].endswith(".parquet")
    assert pq.read_table(tmp_path / marker[0]).num_rows == 0
    assert pq.read_table(tmp_path).num_rows == 6  # whoever reads the folder finds no more rows


@pytest.mark.parametrize("num_images", [0, 2])
def test_rlaifv_refuses_samples_without_exactly_one_image(tmp_path: Path, num_images: int) -> None:
    writer = EXPORTS["rlaifv"](tmp_path, max_part_bytes=10**6)
    (row, *_) = pair_rows(1, num_images=num_images)
    assert writer.write(row) == "needs_one_image"
    assert sum(part.rows for part in writer.close()) == 0


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_trl_prompt_has_as_many_image_parts_as_images(tmp_path: Path, num_images: int) -> None:
    question = "<image>\nHow many?"
    parts = export("trl", tmp_path, pair_rows(1, num_images=num_images, question=question))
    row = pq.read_table(tmp_path / parts[0].name).to_pylist()[0]
    (turn,) = row["prompt"]
    kinds = [part["type"] for part in turn["content"]]
    assert kinds == ["image"] * num_images + ["text"]
    assert len(row["images"]) == num_images
    assert turn["content"][-1]["text"] == "How many?"
    assert all(set(part) == {"type", "text"} for part in turn["content"])
    assert turn["role"] == "user" and row["chosen"][0]["role"] == "assistant"
    assert row["margin"] == row["chosen_score"] - row["rejected_score"] == 3.5
    assert not {"image", "label", "messages", "completion"} & set(row)


BETWEEN = "Is <image> older than <image>?"


@pytest.mark.parametrize(
    ("question", "num_images", "parts"),
    [
        pytest.param(BETWEEN, 2, ["Is ", None, " older than ", None, "?"], id="inside"),
        pytest.param("Is <image> old?", 1, ["Is ", None, " old?"], id="one-inside"),
        pytest.param("Old: <image><image>", 2, ["Old: ", None, None], id="two-behind"),
        pytest.param("<image>\nOld?", 1, [None, "Old?"], id="in-front"),
        pytest.param("Old?\n<image>", 1, [None, "Old?"], id="behind"),
        pytest.param("<image>\n<image>\nOld?", 2, [None, None, "Old?"], id="two-in-front"),
        pytest.param("Is <image> old?", 2, [None, None, "Is  old?"], id="other-number"),
        pytest.param("Is <image> old?", 0, ["Is  old?"], id="no-image"),
        pytest.param("Old?\n", 1, [None, "Old?\n"], id="no-mark"),
    ],
)
def test_marks_inside_a_question_stay_where_they_are(
    tmp_path: Path, question: str, num_images: int, parts: list[str | None]
) -> None:
    """They were gathered in front: "<image><image>Is  older than ?" asks nothing."""
    rows = pair_rows(1, num_images=num_images, question=question)
    marked = "".join("<image>" if part is None else part for part in parts)
    for name in ("trl", "ms_swift", "llama_factory", "ms_swift_jsonl", "llama_factory_jsonl"):
        export(name, tmp_path / name, rows)
    (part,) = (tmp_path / "trl").glob("*.parquet")
    (turn,) = pq.read_table(part).to_pylist()[0]["prompt"]
    assert [(content["type"], content["text"]) for content in turn["content"]] == [
        ("image" if part is None else "text", part) for part in parts
    ]
    for name in ("ms_swift", "ms_swift_jsonl"):
        assert first_row(tmp_path / name)["messages"][0]["content"] == marked
    for name in ("llama_factory", "llama_factory_jsonl"):
        assert first_row(tmp_path / name)["conversations"][0]["value"] == marked


def test_rlaifv_refuses_a_mark_inside_the_question(tmp_path: Path) -> None:
    """Its trainer puts the image in front; without its mark the question is another one."""
    writer = EXPORTS["rlaifv"](tmp_path, max_part_bytes=10**6)
    (row, *_) = pair_rows(1, question="Is <image> old?")
    assert writer.write(row) == "inline_image_mark"
    (row, *_) = pair_rows(1, question="<image>\nOld?")
    assert writer.write(row) is None
    (part,) = writer.close()
    assert pq.read_table(tmp_path / part.name)["question"].to_pylist() == ["Old?"]


@pytest.mark.parametrize("name", ["rlaifv", "trl", "ms_swift"])
def test_parts_and_row_groups_are_bounded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_engine.outputs.parquet.ROW_GROUP_BYTES", 30_000)
    rows = pair_rows(40, image_bytes=5_000)
    parts = export(name, tmp_path, rows, max_part_bytes=120_000)
    assert len(parts) > 2
    assert [part.name for part in parts] == [
        f"train-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))
    ]
    stored = []
    for part in parts:
        file = pq.ParquetFile(tmp_path / part.name)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        assert part.bytes == (tmp_path / part.name).stat().st_size <= 120_000
        assert max(group.num_rows for group in groups) <= 5
        stored += file.read(columns=["idx"]).to_pylist()
    assert [row["idx"] for row in stored] == [row.sample.idx for row in rows]
    assert sum(part.rows for part in parts) == len(rows)


def test_a_part_has_space_for_the_footer_of_all_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_engine.outputs.parquet.ROW_GROUP_BYTES", 1)
    parts = export("rlaifv", tmp_path, pair_rows(40, image_bytes=100), max_part_bytes=120_000)
    assert len(parts) > 1
    assert max(part.bytes for part in parts) <= 120_000


def test_a_row_longer_than_a_part_is_a_part_by_itself(tmp_path: Path) -> None:
    rows = pair_rows(2, image_bytes=5_000)
    parts = export("rlaifv", tmp_path, rows, max_part_bytes=1_000)
    assert [part.rows for part in parts] == [1] * 6


def test_an_image_shared_by_the_pairs_of_a_sample_is_stored_once(tmp_path: Path) -> None:
    parts = export("rlaifv", tmp_path, pair_rows(600, image_bytes=5_000))
    assert parts[0].rows == 1800
    assert parts[0].bytes < 1.3 * 600 * 5_000


def test_an_empty_dataset_has_its_columns(tmp_path: Path) -> None:
    parts = export("rlaifv", tmp_path / "d", [])
    assert [part.rows for part in parts] == [0]
    table = pq.read_table(tmp_path / "d" / parts[0].name)
    assert table.num_rows == 0
    assert table.schema.names == list(EXPORTS["rlaifv"].features)


@pytest.mark.parametrize("name", list(EXPORTS))
def test_same_rows_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        export(name, folder, pair_rows(3))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append([(str(p.relative_to(folder)), p.read_bytes()) for p in files])
    assert contents[0] == contents[1]


def test_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'trl'.*rlaifv, trl"):
        export_class("tlr")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("TRL", "did you mean 'trl'"),
        ("ms-swift", "did you mean 'ms_swift'"),
        ("axolotl", "axolotl reads the rows of `trl`"),
        ("OpenRLHF", "pictures would be lost"),
        ("verl", "pictures would be lost"),
    ],
)
def test_a_name_that_is_nearly_one_or_another_trainers_is_answered(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        export_class(name)
    assert says in str(error.value)


@pytest.mark.parametrize("name", list(EXPORTS))
def test_every_format_says_where_a_row_comes_from_and_its_scores(tmp_path: Path, name: str) -> None:
    (row, *_) = pair_rows(1)
    export(name, tmp_path, [row])
    found = first_row(tmp_path)
    assert (found["chosen_score"], found["rejected_score"]) == (2.5, -1.0)
    # TRL's trainer of reward models would put a margin into its loss.
    assert found.get("margin") == (None if name == "trl_reward" else 3.5)
    assert (found["idx"], found["origin_dataset"]) == (row.sample.idx, "synthetic")


@pytest.mark.parametrize("name", ["ms_swift", "llama_factory"])
def test_pictures_are_inside_and_load_as_images(tmp_path: Path, name: str) -> None:
    rows = [*pair_rows(1, num_images=2), *pair_rows(1, num_images=0)]
    (part,) = export(name, tmp_path / "d", rows)
    dataset = load(tmp_path / "d", tmp_path, part.name)
    assert [len(images) for images in dataset["images"][:]] == [2, 2, 2, 0, 0, 0]
    stored = pq.read_table(tmp_path / "d" / part.name)["images"].to_pylist()[0]
    assert [image["bytes"] for image in stored] == [i.data for i in rows[0].sample.images]
    assert isinstance(dataset[0]["images"][0], Image.Image)


def test_a_question_is_in_one_split_alone_whatever_else_is_there() -> None:
    keys = [synthetic_sample(i).key for i in range(400)]
    test = {key for key in keys if split_of(key, 0.25) == "test"}
    assert 60 < len(test) < 140
    assert test > {key for key in keys if split_of(key, 0.1) == "test"}
    assert not any(split_of(key, 0.0) == "test" for key in keys)


@pytest.mark.parametrize("name", list(EXPORTS))
def test_each_split_has_files_of_its_own(tmp_path: Path, name: str) -> None:
    rows = [dataclasses.replace(row, split=split_of(row.sample.key, 0.5)) for row in pair_rows(8)]
    parts = export(name, tmp_path, rows)
    count = {
        split: sum(part.rows for part in parts if part.name.startswith(split)) for split in SPLITS
    }
    assert count == {split: sum(row.split == split for row in rows) for split in SPLITS}
    assert min(count.values()) > 0
