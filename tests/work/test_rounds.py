"""Rounds: the next slice of questions under other settings, in one run (tests/echo_pipeline.py)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stream_engine import api
from stream_engine.cli.main import main
from stream_engine.config import InputConfig, RunConfig
from stream_engine.errors import ConfigError, RoundOverError, SettingsChangedError
from stream_engine.inputs.ingest import IngestReport, ingest
from stream_engine.pairs.merge_step import merge_when_due
from stream_engine.pipelines import pipeline_class
from stream_engine.ranks import Rank
from stream_engine.report.overview import settings_tables
from stream_engine.report.reading import entries
from stream_engine.report.run import ReportedRun
from stream_engine.report.survey import survey
from stream_engine.run_dir.damage import open_state
from stream_engine.run_dir.inspect import inspect
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.requeue import requeue
from stream_engine.run_dir.results import read_header
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.state import RunState
from stream_engine.work import reading
from stream_engine.work.progress import ProgressView
from stream_engine.work.rounds import begin_round, pipeline_of_round
from stream_engine.work.runner import RunReport, run
from stream_engine.work.worker import Worker
from tests import echo_pipeline
from tests.conftest import file_states, rows_file, write_questions
from tests.echo_pipeline import CALLS, echo_config

pytestmark = pytest.mark.usefixtures("echo")

TWENTY = [f"what is number {i} good for" for i in range(20)]


def config_of(tmp_path: Path, **settings: object) -> RunConfig:
    dataset = tmp_path / "questions.jsonl"
    if not dataset.exists():
        write_questions(dataset, TWENTY)
    return echo_config(tmp_path / "run", dataset, questions=6, **settings)


def play(config: RunConfig, number: int) -> RunReport:
    """A round from its beginning, or where it was, to its dataset."""
    if number > 1:
        assert begin_round(config, number) == number
    return run(config, show_progress=False)


def two_rounds(tmp_path: Path) -> RunConfig:
    """A run with two rounds that are finished; the settings of the second."""
    first = config_of(tmp_path)
    play(first, 1)
    second = dataclasses.replace(first, temperature=0.1)
    play(second, 2)
    return second


def rows_of(dataset: Path) -> list[dict[str, object]]:
    return pq.read_table(rows_file(dataset)).to_pylist()


def asked() -> set[str]:
    """The questions that were answered since CALLS was cleared."""
    return {call.removeprefix("rollouts ") for call in CALLS if call.startswith("rollouts ")}


def test_each_round_takes_the_next_questions_and_leaves_the_pairs_of_others_as_they_are(
    tmp_path: Path,
) -> None:
    first = config_of(tmp_path)
    run_dir = tmp_path / "run"
    play(first, 1)
    assert asked() == set(TWENTY[:6])
    before = file_states(run_dir / "rounds/1")
    for number, slice_of in ((2, TWENTY[6:12]), (3, TWENTY[12:18]), (4, TWENTY[18:])):
        CALLS.clear()
        report = play(dataclasses.replace(first, temperature=0.1 * number), number)
        assert report.exit_status == 0, report.problems
        assert asked() == set(slice_of)
    assert file_states(run_dir / "rounds/1") == before
    rows = rows_of(run_dir / "dataset")
    assert {row["round"] for row in rows} == {1, 2, 3, 4}
    for number in (1, 2, 3, 4):
        own = [row for row in rows if row["round"] == number]
        assert own == rows_of(run_dir / f"rounds/{number}/dataset")
    assert report.status.samples.done == 20


def test_a_round_that_is_asked_for_again_goes_on_and_a_finished_one_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = two_rounds(tmp_path)
    before = file_states(tmp_path / "run/results")
    CALLS.clear()
    with monkeypatch.context() as patched:
        patched.delattr(reading, "ingest")  # it has its questions: no input is opened
        report = play(second, 2)
    assert (CALLS.total(), report.shards_done_here, report.merged_here) == (0, 0, False)
    assert begin_round(second) == 2  # the one at hand has these very settings
    assert begin_round(dataclasses.replace(second, temperature=0.2)) == 3
    assert file_states(tmp_path / "run/results") == before


def test_a_round_is_begun_once_by_however_many_ask_for_it(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    play(first, 1)
    second = dataclasses.replace(first, temperature=0.1)
    with ThreadPoolExecutor(8) as threads:
        numbers = list(threads.map(begin_round, [second] * 8))
    assert numbers == [2] * 8
    run_file = read_run_file(RunDir(tmp_path / "run"))
    assert run_file.fingerprints.firsts == [0, 2]


def test_a_round_waits_until_the_one_before_is_finished(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    run(first, steps=("shard",), show_progress=False)
    second = dataclasses.replace(first, temperature=0.1)
    with pytest.raises(ConfigError, match="round 1 is not finished: 2 of its shards are left"):
        begin_round(second, 2)
    play(first, 1)
    begin_round(second, 2)
    with pytest.raises(ConfigError, match="round 2 is not finished: it has no questions yet"):
        begin_round(dataclasses.replace(first, temperature=0.2), 3)
    with pytest.raises(ConfigError, match="--round 1: the run is at round 2"):
        begin_round(first, 1)


def test_the_settings_of_an_earlier_round_are_refused_in_a_later_one(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    play(first, 1)
    play(dataclasses.replace(first, temperature=0.1), 2)
    with pytest.raises(SettingsChangedError, match=r"since round 2 of .*temperature 0.1 -> 0.7"):
        run(first, show_progress=False)
    with pytest.raises(ConfigError, match="seed is the same in all rounds: 0, not 1"):
        begin_round(dataclasses.replace(first, seed=1), 3)


def test_overwriting_a_round_discards_nothing_of_earlier_ones(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    play(first, 1)
    play(dataclasses.replace(first, temperature=0.1), 2)
    before = file_states(tmp_path / "run/results")
    CALLS.clear()
    run(dataclasses.replace(first, temperature=0.2, overwrite=True), show_progress=False)
    assert asked() == set(TWENTY[6:12])
    after = file_states(tmp_path / "run/results")
    earlier = {name for name in before if int(Path(name).stem) < 2}
    assert {name: before[name] for name in earlier} == {name: after[name] for name in earlier}


def test_what_failed_in_an_earlier_round_is_done_again_by_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both a record that was set aside and a result that was damaged since."""
    write_questions(tmp_path / "questions.jsonl", ["aside at first", *TWENTY])
    second = two_rounds(tmp_path)
    run_dir = RunDir(tmp_path / "run")
    rewards = Path(str(run_dir.result("rewards", 1)))
    content = rewards.read_bytes()
    rewards.write_bytes(content.replace(b"key", b"kex", 1))
    before = file_states(tmp_path / "run/results")
    run_file = read_run_file(run_dir)
    state = RunState(run_dir, run_file.fingerprints, max_shard_retries=2)
    requeue(state, worker="test", timeout_s=60.0)
    monkeypatch.setattr(echo_pipeline, "SET_ASIDE", ())
    CALLS.clear()
    report = run(second, show_progress=False)
    assert report.exit_status == 0, report.problems
    assert asked() <= {"aside at first"}
    own = run_file.fingerprints.of_round(1)["rollouts"]
    assert read_header(run_dir.result("rollouts", 0)).fingerprint == own
    rounds = {row["idx"]: row["round"] for row in rows_of(tmp_path / "run/dataset")}
    assert rounds["0"] == 1
    after = file_states(tmp_path / "run/results")
    of_second = {name for name in before if int(Path(name).stem) > 1 and "msgpack" in name}
    assert of_second and all(before[name] == after[name] for name in of_second)


def test_a_worker_leaves_the_shards_of_other_rounds_alone(tmp_path: Path) -> None:
    second = two_rounds(tmp_path)
    run_dir = RunDir(tmp_path / "run")
    for stage in ("rollouts", "rewards"):
        Path(str(run_dir.result(stage, 0))).unlink()
    pipeline, rank = pipeline_class("echo")(second), Rank.from_environment()
    fingerprints = read_run_file(run_dir).fingerprints
    worker = functools.partial(Worker, run_dir, second, pipeline, fingerprints, rank=rank)
    CALLS.clear()
    assert worker(view=ProgressView(silent=True)).work(read_input=False) == 0 == CALLS.total()
    assert worker(view=ProgressView(silent=True), number=1).work(read_input=False) == 1
    header = read_header(run_dir.result("rollouts", 0))
    assert header.fingerprint == fingerprints.of_round(1)["rollouts"]


def test_a_worker_that_is_late_knows_nothing_of_the_next_round(tmp_path: Path) -> None:
    """One that had not left round 1 yet took the first shards of round 2 for its own."""
    first = config_of(tmp_path)
    play(first, 1)
    run_dir = RunDir(tmp_path / "run")
    pipeline, rank = pipeline_class("echo")(first), Rank.from_environment()
    fingerprints = read_run_file(run_dir).fingerprints
    late = Worker(run_dir, first, pipeline, fingerprints, rank=rank, view=ProgressView(silent=True))
    late.state.refresh()
    second = dataclasses.replace(first, temperature=0.1)
    begin_round(second, 2)
    run(second, steps=("shard",), show_progress=False)
    before = file_states(tmp_path / "run/results")
    assert late.work() == 0 and late.is_settled()
    assert len(late.state.shards) == 2 and len(late.state.manifest.shards) == 4
    assert merge_when_due(late.state, first, pipeline, "late", works=True) == "current"
    assert file_states(tmp_path / "run/results") == before
    with pytest.raises(RoundOverError, match="gone on from round 1"):
        run(first, number=1, show_progress=False)
    with pytest.raises(RoundOverError, match="the run is at round 2"):
        begin_round(first, 1)
    assert read_run_file(run_dir).settings["temperature"] == 0.1


def test_records_that_were_rejected_are_told_of_the_round_that_read_them(tmp_path: Path) -> None:
    dataset = write_questions(tmp_path / "questions.jsonl", TWENTY)
    lines = dataset.read_text().splitlines()
    lines.insert(2, '{"question_id": 70}')
    lines[10:10] = ['{"question_id": 71}', '{"question_id": 72}']
    dataset.write_text("\n".join(lines) + "\n")
    second = two_rounds(tmp_path)

    def told() -> tuple[list[int], list[int]]:
        stats = [
            json.loads((tmp_path / "run" / folder / "stats.json").read_text())["samples"]
            for folder in ("dataset", "rounds/1/dataset", "rounds/2/dataset")
        ]
        of_rounds = api.status(tmp_path / "run").rounds
        return [one["rejected"] for one in stats], [one.rejected for one in of_rounds]

    assert told() == ([3, 1, 2], [1, 2])
    lines[2] = json.dumps(json.loads(lines[0]) | {"question_id": 70, "question": "what is it now"})
    dataset.write_text("\n".join(lines) + "\n")
    play(dataclasses.replace(second, temperature=0.2), 3)
    assert told() == ([2, 1, 1], [1, 1, 0])  # of the sum, whichever was mended


def test_the_answers_of_one_round_are_ranked_by_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_rounds(tmp_path)
    assert main(["rank", str(tmp_path / "run"), "--round", "2"]) == 0
    folder = tmp_path / "run/rounds/2/dataset_ranked"
    told = capsys.readouterr().out
    assert told == f"ranked: 6 questions with all their answers in {folder}\n"
    assert {row["idx"] for row in rows_of(folder)} == {str(i) for i in range(6, 12)}
    stats = json.loads((folder / "stats.json").read_text())
    assert [(one["round"], one["samples"]) for one in stats["rounds"]] == [(2, 6)]
    assert main(["rank", str(tmp_path / "run"), "--round", "3"]) == 1
    assert "no round 3: the run has 2" in capsys.readouterr().err


def test_an_earlier_round_whose_model_has_changed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "questions.jsonl", ["aside at first", *TWENTY])
    second = two_rounds(tmp_path)
    run_dir = RunDir(tmp_path / "run")
    state = RunState(run_dir, read_run_file(run_dir).fingerprints, max_shard_retries=2)
    requeue(state, worker="test", timeout_s=60.0)
    monkeypatch.setattr(echo_pipeline.EchoPipeline, "settings", lambda *_: {"echo_tone": "shrill"})
    run_file = read_run_file(run_dir)
    with pytest.raises(ConfigError, match=r"round 1 are left .*echo_tone plain -> shrill"):
        pipeline_of_round(run_file, 1, second)


def test_appended_questions_belong_to_the_round_at_hand(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    more = write_questions(tmp_path / "more.jsonl", ["and what is more", "and more"], first_id=50)
    report = api.append(tmp_path / "run", [str(more)], show_progress=False)
    assert report.samples_added_here == 2
    rounds = {row["idx"]: row["round"] for row in rows_of(tmp_path / "run/dataset")}
    assert (rounds["0"], rounds["11"], rounds["50"]) == (1, 2, 2)
    report = api.next_round(tmp_path / "run", number=3, temperature=0.2, show_progress=False)
    assert report.samples_added_here == 6


def test_a_reading_that_was_cut_off_is_finished_with_the_rows_of_its_round(tmp_path: Path) -> None:
    """The slice is of one place in the input, however often its reading was begun."""
    first = config_of(tmp_path)
    play(first, 1)
    second = dataclasses.replace(first, temperature=0.1)
    begin_round(second, 2)
    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(Stopped):
        ingest(
            run_dir,
            second.dataset_path,
            second.part(InputConfig),
            first_shard=2,
            on_progress=stop_after(1),
        )
    assert len(Manifest.load(run_dir).shards) == 3
    CALLS.clear()
    play(second, 2)
    assert asked() == set(TWENTY[6:12])


def test_a_round_without_questions_is_an_error_that_says_what_helps(tmp_path: Path) -> None:
    first = dataclasses.replace(config_of(tmp_path), questions=20)
    play(first, 1)
    with pytest.raises(ConfigError, match=r"round 2 has no questions: .*--dataset_path"):
        play(dataclasses.replace(first, temperature=0.1), 2)


def test_status_and_inspect_tell_rounds_and_models(tmp_path: Path) -> None:
    first = config_of(tmp_path, instruct_model_path="/models/a")
    play(first, 1)
    second = dataclasses.replace(first, temperature=0.1, instruct_model_path="/models/b")
    report = play(second, 2)
    told = [(r.round, r.instruct_model, r.samples.done, r.pairs) for r in report.status.rounds]
    written = report.status.pairs.written
    assert [one[:3] for one in told] == [(1, "/models/a", 6), (2, "/models/b", 6)]
    assert sum(one[3] for one in told) == written and all(one[3] for one in told)
    lines = list(inspect(open_state(tmp_path / "run"), "2"))
    assert "round     2, answers of /models/b" in lines
    card = (tmp_path / "run/dataset/README.md").read_text()
    assert f"| 1 | a | 6 | {told[0][3]} |" in card and f"| 2 | b | 6 | {told[1][3]} |" in card
    assert api.validate(tmp_path / "run") == []
    exported = api.export(tmp_path / "run", "trl", number=2)
    assert Path(exported.folder) == tmp_path / "run/rounds/2/dataset_trl"
    assert exported.written == told[1][3]


def test_the_command_begins_a_run_and_its_next_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_questions(tmp_path / "questions.jsonl", TWENTY)
    words = ["--pipeline_name=echo", f"--dataset_path={dataset}", f"--work_dir={tmp_path / 'run'}"]
    words += ["--sample_k=4", "--rank=2", "--samples_per_shard=4", "--questions=6"]
    assert main(["round", *words, "--round=2"]) == 1
    assert "there is no run yet" in capsys.readouterr().err
    assert main(["round", *words, "--round=1"]) == 0
    assert asked() == set(TWENTY[:6])
    CALLS.clear()
    assert main(["round", str(tmp_path / "run"), "--temperature=0.1"]) == 0
    assert asked() == set(TWENTY[6:12])
    capsys.readouterr()
    assert main(["status", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "round 1: 6 samples = 6 done; 18 pairs" in told and "round 2: 6 samples" in told
    CALLS.clear()
    words = ["round", str(tmp_path / "run"), "--temperature=0.2", "--questions=99"]
    assert main(words) == 0
    assert asked() == set(TWENTY[12:])


def test_a_report_tells_rounds_and_the_round_of_each_pair(tmp_path: Path) -> None:
    first = config_of(tmp_path, instruct_model_path="/models/a")
    play(first, 1)
    reported = ReportedRun.open(tmp_path / "run")
    assert "Rounds" not in dict(settings_tables(reported))
    play(dataclasses.replace(first, temperature=0.1, instruct_model_path="/models/b"), 2)
    reported = ReportedRun.open(tmp_path / "run")
    told = dict(settings_tables(reported))["Rounds"]
    assert [number for number, _ in told] == ["1", "2"] and "answers of b" in told[1][1]
    found = survey(reported, num_rows=500)
    assert found.num_kept == reported.stats["pairs"]["written"]
    shown = {entry.idx: entry.round for entry, _ in entries(reported, found.shown)}
    assert (shown["0"], shown["11"]) == (1, 2)


def stop_after(num_shards: int) -> Callable[[IngestReport], None]:
    def stop(report: IngestReport) -> None:
        if report.num_shards >= num_shards:
            raise Stopped

    return stop


class Stopped(Exception):
    """A reading that ends where a kill would end it."""
