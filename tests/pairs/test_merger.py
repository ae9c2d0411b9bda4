"""Merging: conservation, joining by key, folders and formats, statistics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from stream_engine.config import RunConfig
from stream_engine.errors import (
    ConfigError,
    ConservationError,
    MissingStageError,
    ShardReadError,
)
from stream_engine.outputs.formats.base import Packed, PairRow
from stream_engine.outputs.formats.rlaifv import RlaifvExport
from stream_engine.outputs.validate import validate
from stream_engine.pairs import merge_report
from stream_engine.pairs.merge_inputs import read_inputs
from stream_engine.pairs.merger import export, merge
from stream_engine.records import PreferencePair, Sample, SampleRewards, SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import ResultHeader, write_records
from tests.conftest import rows_file
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    bytes_of,
    rows_of,
    run_merge,
    synthetic_rewards,
    synthetic_rollouts,
    synthetic_sample,
    write_run,
    write_stage,
)


def samples(num: int, **options: object) -> list[Sample]:
    return [synthetic_sample(i, **options) for i in range(num)]


def is_current(run_dir: RunDir, **settings: object) -> bool:
    config = RunConfig.create(dict(settings))
    inputs = read_inputs(run_dir, FINGERPRINTS)
    return all(
        merge_report.is_current(folder, inputs, inputs.fingerprint(config, name))
        for name, folder in run_dir.dataset_folders(config.format).items()
    )


def test_samples_and_pairs_are_conserved_and_said_so(run_dir: RunDir) -> None:
    report = run_merge(run_dir)
    assert report.samples["total"] == 20
    assert report.samples["scored"] == 18
    assert report.samples["quarantined"] == {"rollouts": 1, "rewards": 1}
    assert report.candidates == report.written + sum(report.dropped.values())
    assert report.dropped["needs_one_image"] > 0
    assert report.written == len(rows_of(run_dir.dataset_dir)) > 0
    assert "samples: 20 = 18 scored + 1 set aside (rollouts) + 1 set aside" in report.summary()
    assert f"{report.candidates} candidates = {report.written} written" in report.summary()
    stats = json.loads(run_dir.stats_json.read_text())
    assert stats["pairs"] == {
        "candidates": report.candidates,
        "written": report.written,
        "dropped": report.dropped,
    }


def test_rows_are_the_answers_of_their_own_question(run_dir: RunDir) -> None:
    """Answers grouped by position mixed up all questions after the first missing one."""
    run_merge(run_dir)
    originals = {f"idx-{i}": synthetic_sample(i) for i in range(20)}
    rows = rows_of(run_dir.dataset_dir)
    assert {"idx-3", "idx-12", "idx-5"}.isdisjoint(row["idx"] for row in rows)
    for row in rows:
        sample = originals[row["idx"]]
        texts = {answer.text for answer in synthetic_rollouts(sample).answers}
        assert (row["question"], row["image"]["bytes"]) == (
            sample.question,
            sample.images[0].data,
        )
        assert {row["chosen"], row["rejected"]} <= texts


def test_chosen_answers_have_the_higher_score(run_dir: RunDir) -> None:
    run_merge(run_dir, format=("trl",))
    rows = rows_of(run_dir.dataset_dir)
    assert rows and all(row["margin"] > 0 for row in rows)


def test_integer_ids_keep_their_scores(tmp_path: Path) -> None:
    """The ancestor's join matched no integer idx: every score was 0."""
    run_dir = RunDir(tmp_path)
    numbered = [
        msgspec.structs.replace(synthetic_sample(i), idx=str(i), key=f"{i:032x}") for i in range(6)
    ]
    write_run(run_dir, numbered)
    run_merge(run_dir, format=("trl",))
    rows = rows_of(run_dir.dataset_dir)
    assert {row["idx"] for row in rows} == set("012345")
    assert len({row["chosen_score"] for row in rows}) > 6


def test_shard_size_does_not_change_the_dataset(tmp_path: Path) -> None:
    contents = []
    for size in (3, 8, 100):
        run_dir = RunDir(tmp_path / str(size))
        write_run(run_dir, samples(20), samples_per_shard=size)
        run_merge(run_dir, format=("rlaifv", "trl"))
        folders = (run_dir.dataset_dir, run_dir.export_dir("trl"))
        contents.append([rows_file(folder).read_bytes() for folder in folders])
    assert contents[0] == contents[1] == contents[2]


def test_same_results_give_the_same_bytes_everywhere(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        run_dir = RunDir(tmp_path / name)
        write_run(run_dir, samples(10))
        run_merge(run_dir)
        contents.append(bytes_of(run_dir.dataset_dir))
    assert contents[0] == contents[1]
    assert {"README.md", "stats.json"} <= set(contents[0])


def test_a_run_without_shards_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="no shards"):
        run_merge(RunDir(tmp_path))


def test_a_shard_without_results_is_refused_by_name(run_dir: RunDir) -> None:
    run_dir.result("rewards", 1).unlink()
    with pytest.raises(MissingStageError, match=r"1 of 3 shards .*shard 1"):
        run_merge(run_dir)
    assert not run_dir.dataset_dir.exists()


def test_a_shard_without_results_is_left_out_and_counted_when_allowed(run_dir: RunDir) -> None:
    run_dir.result("rewards", 1).unlink()
    report = run_merge(run_dir, allow_partial=True)
    assert report.missing_shards == [1]
    assert report.samples["missing"] == 8
    assert report.samples["total"] == 20 == report.samples["scored"] + 1 + 8
    assert "left out: shard 1" in report.summary()
    assert {row["idx"] for row in rows_of(run_dir.dataset_dir)}.isdisjoint(
        f"idx-{i}" for i in range(8, 16)
    )


def test_results_of_other_settings_do_not_count(run_dir: RunDir) -> None:
    config = RunConfig()
    with pytest.raises(MissingStageError, match="3 of 3"):
        merge(run_dir, config, SyntheticPipeline(config), {**FINGERPRINTS, "rewards": "other"})


def test_a_result_that_covers_a_part_of_its_shard_is_not_complete(run_dir: RunDir) -> None:
    """As `retry-failed` leaves it: the failed sample is no longer in the rollouts' result."""
    info = Manifest.load(run_dir).shards[0]
    rollouts = [synthetic_rollouts(s) for s in samples(8) if s.idx not in ("idx-3", "idx-5")]
    rollouts.insert(4, synthetic_rollouts(synthetic_sample(5, num_images=0)))
    write_stage(run_dir, info, "rollouts", rollouts)
    with pytest.raises(MissingStageError, match="shard 0"):
        run_merge(run_dir)


def test_a_damaged_result_is_named(run_dir: RunDir) -> None:
    path = run_dir.result("rewards", 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardReadError, match=r"rewards/000002\.msgpack"):
        run_merge(run_dir)
    assert not run_dir.dataset_dir.exists()


def test_a_damaged_shard_is_named(run_dir: RunDir) -> None:
    path = run_dir.shard(1)
    path.write_bytes(path.read_bytes()[:-2048])
    with pytest.raises(ShardReadError, match=r"000001\.tar"):
        run_merge(run_dir)
    assert not run_dir.dataset_dir.exists()


def test_headers_that_do_not_add_up_are_refused(run_dir: RunDir) -> None:
    info = Manifest.load(run_dir).shards[0]
    with open(run_dir.result("rewards", 0), "wb") as file:
        header = ResultHeader(
            stage="rewards",
            shard=0,
            shard_sha256=info.sha256,
            fingerprint=FINGERPRINTS["rewards"],
            num_samples=7,
            num_results=5,
            num_quarantined=0,
        )
        kept = [s for s in samples(8) if s.idx != "idx-3"]
        write_records(file, header, [synthetic_rewards(synthetic_rollouts(s)) for s in kept[:5]])
    with pytest.raises(ConservationError, match="shard 0, rewards: 7 samples went in"):
        run_merge(run_dir)


def test_scores_without_answers_are_refused(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    write_run(run_dir, samples(4))
    info = Manifest.load(run_dir).shards[0]
    stranger = synthetic_sample(99)
    rewards = [synthetic_rewards(synthetic_rollouts(s)) for s in (*samples(3), stranger)]
    write_stage(run_dir, info, "rewards", rewards)
    with pytest.raises(ConservationError, match=stranger.key):
        run_merge(run_dir)


def test_a_row_lost_on_the_way_is_noticed_and_the_old_dataset_stays(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_merge(run_dir)
    before = bytes_of(run_dir.dataset_dir)
    original = RlaifvExport.pack

    def forgetful(rows: Sequence[PairRow]) -> Packed:
        kept = original([row for row in rows if row.sample.idx != "idx-7"])
        return Packed(original(rows).refusals, kept.content)

    monkeypatch.setattr(RlaifvExport, "pack", forgetful)
    with pytest.raises(ConservationError, match="but the files hold"):
        run_merge(run_dir, rank=2)
    assert bytes_of(run_dir.dataset_dir) == before
    assert not list(run_dir.root.glob(".dataset*"))


def test_a_pipeline_that_ranks_differently_each_time_is_noticed(run_dir: RunDir) -> None:
    class Fickle(SyntheticPipeline):
        num_calls = 0

        def candidate_pairs(
            self, sample: SampleRollouts, rewards: SampleRewards
        ) -> list[PreferencePair]:
            self.num_calls += 1
            return super().candidate_pairs(sample, rewards)[: 1 if self.num_calls > 18 else None]

    run_dir.rankings_dir.write_text("no folder, so that both passes rank")
    config = RunConfig()
    with pytest.raises(ConservationError, match="the pairs do not add up"):
        merge(run_dir, config, Fickle(config), FINGERPRINTS)
    assert not run_dir.dataset_dir.exists()


def test_a_folder_with_other_files_is_never_overwritten(run_dir: RunDir) -> None:
    run_dir.dataset_dir.mkdir()
    (run_dir.dataset_dir / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="holds other files"):
        run_merge(run_dir)
    assert (run_dir.dataset_dir / "thesis.tex").read_text() == "precious"
    (run_dir.dataset_dir / "thesis.tex").rename(run_dir.dataset_dir / "dataset_info.json")
    with pytest.raises(ConfigError, match="holds other files"):
        run_merge(run_dir)


def test_the_first_format_is_in_dataset_and_others_beside_it(run_dir: RunDir) -> None:
    report = run_merge(run_dir, format=("trl", "rlaifv"))
    assert report.dataset == str(run_dir.dataset_dir)
    assert "images" in rows_of(run_dir.dataset_dir)[0]
    others = rows_of(run_dir.export_dir("rlaifv"))
    assert "logps" in others[0]
    assert report.written == len(rows_of(run_dir.dataset_dir)) > len(others)
    dropped = report.formats["rlaifv"].dropped
    assert report.candidates == len(others) + sum(dropped.values())
    assert "needs_one_image" not in report.dropped and dropped["needs_one_image"] > 0


def test_another_first_format_leaves_nothing_of_the_one_before(run_dir: RunDir) -> None:
    """An empty `train-logps.parquet` beside the rows would fail who reads the whole folder."""
    for name in ("rlaifv", "llama_factory", "trl"):
        run_merge(run_dir, format=(name,))
        assert validate(run_dir.dataset_dir) == []
    found = sorted(p.name for p in run_dir.dataset_dir.rglob("*") if p.is_file())
    rows = rows_file(run_dir.dataset_dir).name
    assert found == ["README.md", "example.jpg", "stats.json", rows]
    assert not [p for p in run_dir.dataset_dir.iterdir() if p.is_dir() and p.name != "assets"]


def test_a_further_format_leaves_the_first_untouched(run_dir: RunDir) -> None:
    run_merge(run_dir)
    before = run_dir.stats_json.stat().st_mtime_ns
    assert run_merge(run_dir, format=("rlaifv", "trl")).is_new
    assert run_dir.stats_json.stat().st_mtime_ns == before
    assert rows_of(run_dir.export_dir("trl"))


def test_export_writes_one_more_format_where_it_is_asked_to(
    run_dir: RunDir, tmp_path: Path
) -> None:
    config = RunConfig()
    pipeline = SyntheticPipeline(config)
    report = export(run_dir, config, pipeline, FINGERPRINTS, format="ms_swift")
    assert Path(report.dataset) == run_dir.export_dir("ms_swift")
    elsewhere = tmp_path / "elsewhere"
    report = export(run_dir, config, pipeline, FINGERPRINTS, format="trl", folder=elsewhere)
    assert len(rows_of(elsewhere)) == report.written
    assert not run_dir.dataset_dir.exists()


def test_an_unknown_format_is_refused_before_any_work(run_dir: RunDir) -> None:
    with pytest.raises(ConfigError, match="unknown format 'parket'"):
        run_merge(run_dir, format=("rlaifv", "parket"))
    assert not run_dir.dataset_dir.exists()


class RatioPipeline(SyntheticPipeline):
    length_balance: ClassVar = "ratio"
    judge_rates: ClassVar = {"flip_rate": ("flips", "verdicts"), "no_rate": ("x", "absent")}


def dropped_by_balance(folder: Path, balance: str | None, **settings: object) -> int:
    """Drops of a run whose chosen answers are never the longer ones."""

    class Shorter(SyntheticPipeline):
        length_balance: ClassVar = balance

        def candidate_pairs(
            self, sample: SampleRollouts, rewards: SampleRewards
        ) -> list[PreferencePair]:
            words = {answer.index: len(answer.text.split()) for answer in sample.answers}
            pairs = super().candidate_pairs(sample, rewards)
            return [pair for pair in pairs if words[pair.chosen] <= words[pair.rejected]]

    run_dir = RunDir(folder)
    write_run(run_dir, samples(30))
    config = RunConfig.create(dict(settings))
    return merge(run_dir, config, Shorter(config), FINGERPRINTS).dropped.get("length_balance", 0)


def test_each_pipeline_gets_the_length_balance_it_asks_for(tmp_path: Path) -> None:
    assert dropped_by_balance(tmp_path / "a", "ratio") > 0
    assert dropped_by_balance(tmp_path / "b", "mean") == 0
    assert dropped_by_balance(tmp_path / "c", "mean", max_length_bias=-8.0) > 0
    assert dropped_by_balance(tmp_path / "d", None, max_length_bias=-8.0) == 0


def test_statistics_sum_over_the_run(run_dir: RunDir) -> None:
    config = RunConfig()
    merge(run_dir, config, RatioPipeline(config), FINGERPRINTS)
    stats = json.loads(run_dir.stats_json.read_text())
    assert stats["answers"]["total"] == 18 * 10
    assert stats["answers"]["unscored"] == {"no_tokens": 18}
    assert stats["answers"]["scored"] == 18 * 9
    assert stats["answers"]["finish_reasons"] == {"length": 18, "stop": 18 * 9}
    assert stats["judge"]["counts"] == {"flips": 18.0, "verdicts": 72.0}
    assert stats["judge"]["rates"] == {"flip_rate": 0.25}
    rows = rows_of(run_dir.dataset_dir)
    lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows]
    wins = stats["length_wins"]
    assert wins["longer"] == sum(chosen > rejected for chosen, rejected in lengths)
    assert wins["shorter"] == sum(chosen < rejected for chosen, rejected in lengths)
    assert wins["longer"] + wins["shorter"] + wins["equal"] == len(rows)
    mean = sum(chosen for chosen, _ in lengths) / len(rows)
    assert stats["words"]["chosen"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert sum(stats["margin"]["histogram"]["counts"]) == len(rows)
    assert stats["samples"]["with_pairs"] == len({row["idx"] for row in rows})
    assert sum(stats["samples"]["with_images"].values()) == stats["samples"]["total"]
    card = (run_dir.dataset_dir / "README.md").read_text()
    for number, count in stats["samples"]["with_images"].items():
        noun = "picture" if number == "1" else "pictures"
        assert f"| ... with {number} {noun} | {count} |" in card


def test_a_run_in_which_no_pair_survives_is_an_empty_dataset(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    write_run(run_dir, samples(4))
    report = run_merge(run_dir, max_length_bias=-1000.0)
    assert report.written == 0
    assert report.dropped["length_balance"] > 0
    assert rows_of(run_dir.dataset_dir) == []
