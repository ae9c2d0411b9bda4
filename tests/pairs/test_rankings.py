"""Rankings that are kept beside the results: used for what made them alone, and never needed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from stream_engine.config import RunConfig
from stream_engine.errors import ChangedError, ConservationError
from stream_engine.pairs import helpers, merger, rankings
from stream_engine.pairs.helpers import Crew
from stream_engine.pairs.merge_inputs import read_inputs
from stream_engine.pairs.merge_report import MergeReport
from stream_engine.pairs.merger import merge
from stream_engine.pairs.rankings import kept_ranking, rank_finished, ranking_settings
from stream_engine.pairs.rows import RowMaker
from stream_engine.pipelines.dpo_reward import DPORewardPipeline
from stream_engine.records import SampleRewards
from stream_engine.run_dir import results
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.rankings import RankedShard, checksums, is_damaged, read_ranking
from stream_engine.run_dir.requeue import requeue
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.state import RunState
from stream_engine.run_dir.verify import damaged_parts
from stream_engine.store.base import Location
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    bytes_of,
    run_merge,
    synthetic_sample,
    write_example_run,
    write_stage,
)


def merge_anew(run_dir: RunDir, **settings: object) -> tuple[MergeReport, dict[str, bytes]]:
    """Merge without the dataset of before; returns also the files that come of it."""
    shutil.rmtree(run_dir.dataset_dir, ignore_errors=True)
    report = run_merge(run_dir, **settings)
    return report, bytes_of(run_dir.dataset_dir)


def state_of(run_dir: RunDir) -> RunState:
    return RunState(run_dir, FINGERPRINTS, max_shard_retries=2).refresh()


def fits(run_dir: RunDir, index: int = 0, **settings: object) -> bool:
    """Whether the ranking of a shard is one that a merge under these settings uses."""
    found = checksums(run_dir, index)
    assert found is not None
    made_by = ranking_settings(SyntheticPipeline(RunConfig.create(dict(settings))))
    return kept_ranking(run_dir, index, settings=made_by, results=found) is not None


def test_a_merge_ranks_each_shard_once_and_the_next_not_at_all(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[int] = []
    original = rankings.rank_shard

    def counted(run_dir: RunDir, pipeline: object, info: object, **kwargs: object) -> object:
        ranked.append(info.index)  # type: ignore[attr-defined]
        return original(run_dir, pipeline, info, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(rankings, "rank_shard", counted)
    _, first = merge_anew(run_dir)
    assert ranked == [0, 1, 2]
    _, second = merge_anew(run_dir)
    assert ranked == [0, 1, 2]
    assert second == first


def test_a_merge_with_rankings_reads_half_as_many_bytes_of_results(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: Counter[str] = Counter()
    records: Counter[str] = Counter()
    original = results.verify_checksum, results.read_frame

    def verified(path: Location, file: object, **kwargs: object) -> None:
        passes[path.parent.name] += 1
        original[0](path, file, **kwargs)  # type: ignore[arg-type]

    def framed(path: Location, file: object) -> bytes:
        records[path.parent.name] += 1
        return original[1](path, file)  # type: ignore[arg-type]

    monkeypatch.setattr(results, "verify_checksum", verified)
    monkeypatch.setattr(results, "read_frame", framed)
    merge_anew(run_dir)
    assert passes == {"rollouts": 6, "rewards": 6}  # three shards, ranked and written
    first = records.copy()
    passes.clear()
    records.clear()
    merge_anew(run_dir)
    assert passes == {"rollouts": 3, "rewards": 3}
    assert records["rewards"] == 3  # their headers alone
    assert records["rollouts"] < first["rollouts"]


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 2},
        {"distance": 3},
        {"strict_follow_rank": True},
        {"similarity_threshold": 0.1},
        {"max_pairs_per_sample": 1},
        {"compat": "rlaifv"},
        {"disagreements": "drop"},
        {"seed": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_ranking_is_of_its_settings_alone(
    settings: dict[str, object], run_dir: RunDir, tmp_path: Path
) -> None:
    run_merge(run_dir)
    assert fits(run_dir)
    assert not fits(run_dir, **settings)
    _, with_others_there = merge_anew(run_dir, **settings)
    assert fits(run_dir, **settings)
    _, from_nothing = merge_anew(write_example_run(tmp_path / "other"), **settings)
    assert rows_in(with_others_there) == rows_in(from_nothing)


def rows_in(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".parquet")}


def test_a_ranking_is_not_of_other_code(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run_merge(run_dir)
    monkeypatch.setattr(rankings, "hash_of_code", lambda code: "edited")
    assert not fits(run_dir)


def test_a_ranking_is_not_of_results_that_were_replaced(run_dir: RunDir) -> None:
    run_merge(run_dir)
    records = list(read_results(run_dir.result("rewards", 1), SampleRewards))
    turned = [
        msgspec.structs.replace(
            record,
            scores=[
                msgspec.structs.replace(
                    score, score=-score.score, scores={n: -v for n, v in score.scores.items()}
                )
                for score in record.scores
            ],
        )
        for record in records
    ]
    before = read_ranking(run_dir, 1)
    replace_rewards(run_dir, turned)
    assert fits(run_dir, 0)
    assert not fits(run_dir, 1)
    run_merge(run_dir)
    after = read_ranking(run_dir, 1)
    assert before is not None and after is not None
    assert order_in(after) != order_in(before)
    assert fits(run_dir, 1)


def test_a_retry_leaves_no_ranking_of_the_results_before(run_dir: RunDir) -> None:
    run_merge(run_dir)
    assert all(fits(run_dir, index) for index in range(3))
    requeue(state_of(run_dir), worker="w", timeout_s=60.0)
    assert [fits(run_dir, index) for index in range(3)] == [False, False, True]


def order_in(ranked: RankedShard) -> list[tuple[int, int, int]]:
    return [(pair.sample, pair.chosen, pair.rejected) for pair in ranked.pairs]


def replace_rewards(run_dir: RunDir, records: list[SampleRewards]) -> None:
    """Other scores of shard 1, as a retry would write them."""
    info = Manifest.load(run_dir).shards[1]
    scored = {record.key for record in records}
    failed = [
        sample
        for sample in map(synthetic_sample, range(8, 16))
        if sample.key in info.keys and sample.key not in scored
    ]
    write_stage(run_dir, info, "rewards", records, failed)


@pytest.mark.parametrize("harm", ["delete", "cut", "change a byte", "another shard's", "no file"])
def test_harm_to_a_ranking_changes_nothing_in_the_dataset(harm: str, run_dir: RunDir) -> None:
    _, before = merge_anew(run_dir)
    path = run_dir.ranking(1)
    data = path.read_bytes()
    if harm == "delete":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[:-10])
    elif harm == "change a byte":
        path.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif harm == "another shard's":
        path.write_bytes(run_dir.ranking(0).read_bytes())
    else:
        path.write_bytes(b"")
    assert not fits(run_dir, 1)
    _, after = merge_anew(run_dir)
    assert after == before
    assert fits(run_dir, 1)


def test_a_damaged_ranking_is_told_and_a_deleted_one_is_not(run_dir: RunDir) -> None:
    run_merge(run_dir)
    path = run_dir.ranking(1)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert is_damaged(run_dir, 1)
    problems = list(damaged_parts(state_of(run_dir)))
    assert [line for line in problems if str(path) in line]
    path.unlink()
    assert not [line for line in damaged_parts(state_of(run_dir)) if "rankings" in line]


def test_rankings_that_cannot_be_kept_are_made_where_they_are_needed(run_dir: RunDir) -> None:
    _, kept = merge_anew(run_dir)
    for path in run_dir.rankings_dir.iterdir():
        path.unlink()
    run_dir.rankings_dir.rmdir()
    run_dir.rankings_dir.write_text("a file where the folder would be")
    _, not_kept = merge_anew(run_dir)
    assert not_kept == kept


def test_a_finished_shard_is_ranked_for_the_merge(run_dir: RunDir) -> None:
    info = Manifest.load(run_dir).shards[2]
    rank_finished(run_dir, SyntheticPipeline(RunConfig()), info)
    assert fits(run_dir, 2)
    assert read_ranking(run_dir, 0) is None


def test_a_result_that_is_replaced_between_ranking_and_writing_is_noticed(run_dir: RunDir) -> None:
    config = RunConfig()
    pipeline, inputs = SyntheticPipeline(config), read_inputs(run_dir, FINGERPRINTS)
    ((info, order), *_) = merger.kept_rankings(run_dir, pipeline, inputs)
    replace = list(read_results(run_dir.result("rewards", 1), SampleRewards))
    maker = RowMaker(run_dir, pipeline, config.part(merger.OutputConfig), ["rlaifv"])
    ranked = helpers.rank(order, maker)  # type: ignore[arg-type]
    assert info.index == 0 and ranked.pairs
    orders = list(merger.kept_rankings(run_dir, pipeline, inputs))
    replace_rewards(run_dir, replace[:-1])
    with pytest.raises(ChangedError):
        helpers.rank(orders[1][1], maker)  # type: ignore[arg-type]


# -- helpers --------------------------------------------------------------------------------------


def merge_with_helpers(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, **settings: object
) -> dict[str, bytes]:
    """Merge as a large run is merged, by a pipeline that helpers can find."""
    monkeypatch.setattr(helpers, "SAMPLES_FOR_HELPERS", 0)
    monkeypatch.setattr(helpers, "num_cores", lambda: 2)
    return merge_of_class(run_dir, **settings)


def merge_of_class(run_dir: RunDir, **settings: object) -> dict[str, bytes]:
    paths = {"instruct_model_path": "instruct", "reward_model_path": "reward"}
    config = RunConfig.create({**paths, **settings})
    shutil.rmtree(run_dir.dataset_dir, ignore_errors=True)
    merge(run_dir, config, DPORewardPipeline(config), FINGERPRINTS)
    return bytes_of(run_dir.dataset_dir)


def test_helpers_make_the_same_dataset(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = merge_of_class(run_dir, max_part_bytes=20_000)
    for path in run_dir.rankings_dir.iterdir():
        path.unlink()
    assert merge_with_helpers(run_dir, monkeypatch, max_part_bytes=20_000) == alone
    assert len(list(run_dir.rankings_dir.glob("*.msgpack"))) == 3


@pytest.mark.parametrize("stage", ["rollouts", "rewards"])
def test_damage_that_a_helper_meets_names_the_file(
    stage: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_of_class(run_dir)
    path = run_dir.result(stage, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    with pytest.raises(results.ShardReadError) as raised:
        merge_with_helpers(run_dir, monkeypatch)
    assert raised.value.path == str(path)


def test_a_helper_that_dies_ends_the_merge_and_not_the_dataset(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = merge_of_class(run_dir)
    original = Crew.begin

    def killing(crew: Crew, order: helpers.Order) -> helpers.Pieces:
        pieces = original(crew, order)
        for helper in crew.helpers:
            helper.process.kill()
        return pieces

    monkeypatch.setattr(Crew, "begin", killing)
    monkeypatch.setattr(helpers, "SAMPLES_FOR_HELPERS", 0)
    with pytest.raises(helpers.StreamEngineError, match="ended with status -9"):
        run = {"instruct_model_path": "instruct", "reward_model_path": "reward", "rank": 2}
        config = RunConfig.create(run)
        merge(run_dir, config, DPORewardPipeline(config), FINGERPRINTS)
    assert bytes_of(run_dir.dataset_dir) == before


def test_a_pipeline_without_a_name_is_ranked_by_the_merging_process(run_dir: RunDir) -> None:
    class Local(SyntheticPipeline):
        pass

    assert not helpers.can_be_found(Local(RunConfig()))
    assert helpers.can_be_found(SyntheticPipeline(RunConfig()))


def test_errors_come_through_as_they_were() -> None:
    for error in (
        results.ShardReadError("a/b.tar", "torn", "m.json"),
        ChangedError("a/b"),
        ConservationError("3 and 4"),
        OSError(5, "Input/output error", "a/b"),
    ):
        sent = helpers.failed(error)
        again = helpers.ERRORS[sent.kind](*sent.arguments)
        assert (type(again), str(again)) == (type(error), str(error))
