"""What a merge goes on from: never another dataset than from nothing, and nothing counted twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from stream_engine.config import RunConfig
from stream_engine.pairs import merger
from stream_engine.pairs.merge_inputs import read_inputs
from stream_engine.pairs.milestones import read_milestones
from stream_engine.records import PreferencePair, SampleRewards, SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import RankedShard
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.rounds import Fingerprints
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    bytes_of,
    synthetic_sample,
    write_run,
    write_stage,
)

FORMATS = ("trl", "rlaifv")
NUM_SAMPLES = 104
ALL_STAY: dict[str, Any] = {"max_part_bytes": 20_000, "max_length_bias": 1000.0}


class Ratio(SyntheticPipeline):
    """Its chosen answers are rather the shorter ones, so that this balance has work."""

    length_balance: ClassVar = "ratio"

    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        words = {answer.index: len(answer.text.split()) for answer in sample.answers}
        pairs = super().candidate_pairs(sample, rewards)
        return [pair for pair in pairs if words[pair.chosen] <= words[pair.rejected] + 4]


class Unbalanced(SyntheticPipeline):
    length_balance: ClassVar = None


PIPELINES = {"mean": SyntheticPipeline, "ratio": Ratio, "none": Unbalanced}


def merged(
    run_dir: RunDir,
    kind: str = "mean",
    *,
    second_round: int | None = None,
    elsewhere: Path | None = None,
    **settings: object,
) -> dict[str, bytes]:
    """Merge into both formats, in the run's folders or in those of another place; a second round
    may begin at a shard. Returns all files of both."""
    config = RunConfig.create({"format": FORMATS, **settings})
    earlier = [(0, FINGERPRINTS)] if second_round else []
    inputs = read_inputs(run_dir, Fingerprints(FINGERPRINTS, earlier, second_round or 0))
    configs = dict.fromkeys(range(1, len(earlier) + 2), config)
    folders = RunDir(elsewhere or run_dir.root).dataset_folders(config.format)
    pipeline = PIPELINES[kind](config)
    merger.write_formats(run_dir, configs, pipeline, inputs, folders, allow_partial=False)
    found = {name: bytes_of(Path(str(folder))) for name, folder in folders.items()}
    return {f"{name}/{file}": data for name in found for file, data in found[name].items()}


def merged_from_nothing(run_dir: RunDir, kind: str = "mean", **settings: Any) -> dict[str, bytes]:
    """The same without anything that merges have left."""
    for folder in (*run_dir.dataset_folders(FORMATS).values(), run_dir.rankings_dir):
        shutil.rmtree(folder, ignore_errors=True)
    return merged(run_dir, kind, **settings)


def grow(run_dir: RunDir, first: int, end: int) -> None:
    write_run(run_dir, map(synthetic_sample, range(first, end)), sample_k=4)


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose rankings were asked for."""
    shards: list[int] = []
    kept_ranking = merger.kept_ranking

    def noted(run_dir: RunDir, index: int, **made_from: Any) -> RankedShard | None:
        shards.append(index)
        return kept_ranking(run_dir, index, **made_from)

    monkeypatch.setattr(merger, "kept_ranking", noted)
    return shards


@pytest.mark.parametrize(
    ("kind", "test_fraction"), [("mean", 0.0), ("mean", 0.3), ("ratio", 0.0), ("none", 0.0)]
)
def test_appends_come_to_what_one_merge_comes_to(
    tmp_path: Path, kind: str, test_fraction: float
) -> None:
    run_dir, first = RunDir(tmp_path), 0
    settings = {"max_part_bytes": 12_000, "max_length_bias": -1.0, "test_fraction": test_fraction}
    for end in (48, 96, NUM_SAMPLES):
        grow(run_dir, first, end)
        appended, first = merged(run_dir, kind, **settings), end
    dropped = json.loads(appended["trl/stats.json"])["pairs"]["dropped"]
    assert bool(dropped.get("length_balance")) == (kind != "none")
    assert appended == merged_from_nothing(run_dir, kind, **settings)


def test_a_round_that_begins_comes_to_what_one_merge_of_both_comes_to(tmp_path: Path) -> None:
    run_dir, first = RunDir(tmp_path), 0
    settings = {"max_part_bytes": 15_000, "max_length_bias": -3.0}
    for end in (56, 80, NUM_SAMPLES):
        grow(run_dir, first, end)
        first, second_round = end, None if end == 56 else 7
        appended = merged(run_dir, second_round=second_round, **settings)
    assert appended == merged_from_nothing(run_dir, second_round=7, **settings)
    rounds = json.loads(appended["trl/stats.json"])["rounds"]
    assert min(one["pairs"] for one in rounds) > 10


def test_an_append_looks_at_new_shards_and_at_those_of_the_last_parts(
    tmp_path: Path, ranked: list[int]
) -> None:
    run_dir = RunDir(tmp_path)
    grow(run_dir, 0, 96)
    merged(run_dir, **ALL_STAY)
    grow(run_dir, 96, NUM_SAMPLES)
    ranked.clear()
    appended = merged(run_dir, **ALL_STAY)
    new = len(Manifest.load(run_dir).shards) - 1
    assert ranked[:2] == [new, 0], "the new one is counted, the first one is on the card"
    second = ranked[2:]
    assert second == list(range(second[0], new + 1)) and second[0] > new // 2
    assert appended == merged_from_nothing(run_dir, **ALL_STAY)


@pytest.mark.parametrize("shard", [1, 12])
def test_scores_that_change_are_counted_from_there_on(
    tmp_path: Path, ranked: list[int], shard: int
) -> None:
    """Of the last shard they are new extremes, too, by which all margins are counted again."""
    run_dir = RunDir(tmp_path)
    grow(run_dir, 0, NUM_SAMPLES)
    before = merged(run_dir, **ALL_STAY)
    path = run_dir.result("rewards", shard)
    records = [
        msgspec.structs.replace(
            one,
            scores=[
                msgspec.structs.replace(s, scores={name: 10 * x for name, x in s.scores.items()})
                for s in one.scores
            ],
        )
        for one in read_results(path, SampleRewards)
    ]
    write_stage(run_dir, Manifest.load(run_dir).shards[shard], "rewards", records)
    ranked.clear()
    again = merged(run_dir, **ALL_STAY)
    greatest = [json.loads(f["trl/stats.json"])["margin"]["max"] for f in (before, again)]
    assert greatest[1] > greatest[0]
    assert set(range(13)) <= set(ranked)
    assert again == merged_from_nothing(run_dir, **ALL_STAY)


@pytest.mark.parametrize("harm", ["cut", "change a byte", "delete", "make unreadable"])
def test_harm_to_milestones_changes_nothing_in_the_dataset(tmp_path: Path, harm: str) -> None:
    run_dir = RunDir(tmp_path)
    grow(run_dir, 0, 96)
    merged(run_dir, **ALL_STAY)
    grow(run_dir, 96, NUM_SAMPLES)
    for format in FORMATS:
        path = Path(str(run_dir.milestones(format)))
        data = path.read_bytes()
        assert read_milestones(path).of_origins
        if harm in ("delete", "make unreadable"):
            path.unlink()
            if harm == "make unreadable":  # for root, too
                path.mkdir()
        elif harm == "change a byte":
            path.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
        else:
            path.write_bytes(data[:-10])
        assert read_milestones(path).counted is None
    assert merged(run_dir, **ALL_STAY) == merged_from_nothing(run_dir, **ALL_STAY)


def test_milestones_of_other_splits_are_no_beginning(tmp_path: Path) -> None:
    """Pairs exported elsewhere without a split `test` had left theirs, and rows stood twice."""
    run_dir, settings = RunDir(tmp_path / "run"), {**ALL_STAY, "test_fraction": 0.4}
    grow(run_dir, 0, 96)
    merged(run_dir, **settings)
    merged(run_dir, elsewhere=tmp_path / "elsewhere", **ALL_STAY)
    grow(run_dir, 96, NUM_SAMPLES)
    appended = merged(run_dir, **settings)
    assert appended == merged_from_nothing(run_dir, **settings)
