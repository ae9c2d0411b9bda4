from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream_engine.demo.score import score_pairs
from stream_engine.demo.world import Picture, make_picture
from stream_engine.errors import ConfigError
from stream_engine.outputs.reading import read_pairs

STRINGS = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([*((name, pa.string()) for name in (*STRINGS, "image_path")), ("image", IMAGE)])


def true_and_false(picture: Picture) -> tuple[str, str]:
    """Answers without a wrong fact and with one."""
    number = len(picture.scene.shapes())
    words = ("", "one shape", "two shapes", "three shapes", "four shapes", "one shape")
    return f"I count {words[number]}.", f"I count {words[number + 1]}."


def write_pairs(work_dir: Path, pairs: list[tuple[Picture, str, str]], name: str = "0") -> None:
    (work_dir / "dataset").mkdir(exist_ok=True)
    rows = [
        {
            **dict.fromkeys((*STRINGS, "image_path"), ""),
            "idx": picture.idx,
            "question": picture.question,
            "chosen": chosen,
            "rejected": rejected,
            "image": {"bytes": picture.png, "path": None},
        }
        for picture, chosen, rejected in pairs
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, work_dir / "dataset" / f"train-{name}.parquet")


def test_pairs_are_scored_against_the_truth(tmp_path: Path) -> None:
    a, b, c = (make_picture(3, number) for number in range(3))
    (true_a, false_a), (true_b, false_b), (_, false_c) = map(true_and_false, (a, b, c))
    write_pairs(tmp_path, [(a, true_a, false_a), (b, false_b, true_b)], "0")
    write_pairs(tmp_path, [(c, false_c, "What?"), (a, true_a, f"{false_a} {false_a}")], "1")
    assert score_pairs(read_pairs(tmp_path / "dataset")) == {
        "pairs": 4,
        "pair_accuracy": 2.5 / 4,
        "wrong_facts_chosen": 2 / 4,
        "wrong_facts_rejected": 4 / 4,
    }


def test_a_dataset_without_pairs_scores_zero(tmp_path: Path) -> None:
    write_pairs(tmp_path, [])
    assert score_pairs(read_pairs(tmp_path / "dataset")) == {
        "pairs": 0,
        "pair_accuracy": 0.0,
        "wrong_facts_chosen": 0.0,
        "wrong_facts_rejected": 0.0,
    }


def test_a_run_without_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no dataset"):
        score_pairs(read_pairs(tmp_path / "dataset"))
