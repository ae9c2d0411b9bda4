"""run.json: settings of different runs never mix."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.demo.data import write_dataset
from stream_engine.errors import ConfigError, SettingsChangedError
from stream_engine.run_dir.engines import note_engines
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.store.leases import Lease
from stream_engine.work.runner import RunReport, run
from tests.conftest import file_states, write_questions
from tests.echo_pipeline import CALLS, echo_config

pytestmark = pytest.mark.usefixtures("echo")

SIX = [f"what is number {i} good for" for i in range(6)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.jsonl", SIX)


def rerun(tmp_path: Path, dataset: Path, **settings: object) -> RunReport:
    CALLS.clear()
    return run(echo_config(tmp_path / "run", dataset, **settings), show_progress=False)


def stages_called() -> set[str]:
    return {call.split()[0] for call in CALLS}


def test_changed_sampling_is_refused_by_name(tmp_path: Path, dataset: Path) -> None:
    rerun(tmp_path, dataset)
    with pytest.raises(SettingsChangedError) as caught:
        rerun(tmp_path, dataset, temperature=1.0, seed=3)
    message = str(caught.value)
    assert "temperature 0.7 -> 1.0" in message and "seed 0 -> 3" in message
    assert "rollouts, rewards" in message and "--overwrite" in message
    assert "\n" not in message and not CALLS


def test_a_changed_reward_setting_names_the_rewards_alone(tmp_path: Path, dataset: Path) -> None:
    rerun(tmp_path, dataset)
    with pytest.raises(SettingsChangedError, match=r"echo_tone plain -> shrill.*of: rewards\."):
        rerun(tmp_path, dataset, pipeline_options={"echo_tone": "shrill"})


def test_overwrite_discards_exactly_the_stages_that_the_change_feeds(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rerun(tmp_path, dataset)
    before = file_states(tmp_path / "run/results/rollouts")
    report = rerun(tmp_path, dataset, pipeline_options={"echo_tone": "shrill"}, overwrite=True)
    assert stages_called() == {"rewards"}
    assert report.exit_status == 0
    assert file_states(tmp_path / "run/results/rollouts") == before
    assert "discarded rewards" in capsys.readouterr().err


def test_a_result_of_other_settings_that_comes_late_does_not_count(
    tmp_path: Path, dataset: Path
) -> None:
    """A worker of the old settings may write once more after its stage was discarded."""
    rerun(tmp_path, dataset)
    path = RunDir(tmp_path / "run").result("rewards", 0)
    late = path.read_bytes()
    shrill = {"pipeline_options": {"echo_tone": "shrill"}}
    rerun(tmp_path, dataset, overwrite=True, **shrill)
    path.write_bytes(late)
    assert rerun(tmp_path, dataset, **shrill).shards_done_here == 1
    assert stages_called() == {"rewards"}
    assert path.read_bytes() != late


def test_overwrite_without_a_change_discards_nothing(tmp_path: Path, dataset: Path) -> None:
    rerun(tmp_path, dataset)
    report = rerun(tmp_path, dataset, overwrite=True)
    assert not CALLS and not report.merged_here


def test_a_changed_rank_only_merges_again(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rerun(tmp_path, dataset)
    report = rerun(tmp_path, dataset, rank=1)
    assert report.merged_here and not CALLS
    assert "rank 2 -> 1; pairs are built again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [{"lease_timeout_s": 30.0}, {"max_rows": 7}, {"device": "cpu"}, {"max_shard_retries": 5}],
)
def test_settings_that_shape_no_result_change_freely(
    tmp_path: Path, dataset: Path, setting: dict[str, object]
) -> None:
    rerun(tmp_path, dataset)
    report = rerun(tmp_path, dataset, **setting)
    assert not CALLS and not report.merged_here and report.exit_status == 0


def test_settings_may_change_before_there_are_results(tmp_path: Path, dataset: Path) -> None:
    run(echo_config(tmp_path / "run", dataset), steps=("shard",), show_progress=False)
    assert rerun(tmp_path, dataset, temperature=1.0).exit_status == 0


def test_results_on_hand_are_not_discarded_under_a_worker(tmp_path: Path, dataset: Path) -> None:
    rerun(tmp_path, dataset)
    run_dir = RunDir(tmp_path / "run")
    lease = Lease.acquire(
        run_dir.leases_dir, "shard-000001", worker_id="rank7@elsewhere", timeout_s=60
    )
    assert lease is not None
    with lease, pytest.raises(SettingsChangedError, match="rank7@elsewhere"):
        rerun(tmp_path, dataset, seed=1, overwrite=True)


def test_a_folder_with_other_files_is_refused(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("the only copy")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        rerun(tmp_path, dataset, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["thesis.tex"]


def test_versions_and_settings_are_kept(tmp_path: Path, dataset: Path) -> None:
    rerun(tmp_path, dataset)
    run_file = read_run_file(RunDir(tmp_path / "run"))
    assert {"torch", "python", "stream_engine"} <= run_file.versions.keys()
    assert run_file.config().dataset_path == (str(dataset),)
    assert run_file.fingerprints.keys() == {"rollouts", "rewards"}


def said(device: str, dtype: str) -> dict[str, dict[str, object]]:
    return {"instruct": {"stage": "rollouts", "device": device, "dtype": dtype}}


def test_a_worker_in_another_precision_is_refused(tmp_path: Path, dataset: Path) -> None:
    """A node with a broken driver joined on its CPU in float32: its log-probs compared with no
    other's, and it held the last shards for days."""
    rerun(tmp_path, dataset)
    run_dir = RunDir(tmp_path / "run")
    note_engines(run_dir, said("cuda:3", "bfloat16"), worker="rank0@a")
    note_engines(run_dir, said("cuda:0", "bfloat16"), worker="rank1@a")
    for other in (said("cpu", "bfloat16"), said("cuda:3", "float32")):
        with pytest.raises(ConfigError, match=r"this run's instruct is on cuda in bfloat16.*mend"):
            note_engines(run_dir, other, worker="rank2@b")
    assert read_run_file(run_dir).engines == said("cuda:3", "bfloat16")


def test_a_worker_in_another_precision_is_refused_before_the_first_result(
    tmp_path: Path, dataset: Path
) -> None:
    run(echo_config(tmp_path / "run", dataset), steps=("shard",), show_progress=False)
    run_dir = RunDir(tmp_path / "run")
    note_engines(run_dir, said("cuda:3", "bfloat16"), worker="rank0@a")
    lease = Lease.acquire(run_dir.leases_dir, "shard-000001", worker_id="rank0@a", timeout_s=60)
    assert lease is not None
    with lease, pytest.raises(ConfigError, match="instruct would run here on cpu in float32"):
        note_engines(run_dir, said("cpu", "float32"), worker="rank2@b")
    note_engines(run_dir, said("cpu", "float32"), worker="rank2@b")  # the other gave up
    assert read_run_file(run_dir).engines == said("cpu", "float32")


def test_engines_of_earlier_settings_are_forgotten(tmp_path: Path) -> None:
    """The card said temperature 0.7 after --overwrite with 1.3: what the first engine said of
    itself stayed for good."""
    words = ("run", "--demo", "--sample_k=2", "--rank=1", "--max_new_tokens=8", "--device=cpu")
    data = write_dataset(tmp_path / "questions.parquet", count=2, seed=5)
    words = (*words, "--failures_ok", f"--dataset_path={data}", f"--work_dir={tmp_path / 'run'}")
    assert main([*words, "--temperature=0.7"]) == 0
    engines = read_run_file(RunDir(tmp_path / "run")).engines
    assert engines["instruct"]["sampling"]["temperature"] == 0.7
    assert main([*words, "--temperature=1.3", "--overwrite"]) == 0
    run_file = read_run_file(RunDir(tmp_path / "run"))
    assert run_file.engines["instruct"]["sampling"]["temperature"] == 1.3
    assert run_file.engines.keys() == engines.keys()
    card = (tmp_path / "run/dataset/README.md").read_text()
    assert "1.3" in card and "0.7" not in card


def test_datasets_of_several_calls_are_all_kept(tmp_path: Path, dataset: Path) -> None:
    rerun(tmp_path, dataset)
    more = write_questions(tmp_path / "more.jsonl", ["one more thing"], first_id=90)
    rerun(tmp_path, more)
    kept = read_run_file(RunDir(tmp_path / "run")).config().dataset_path
    assert kept == (str(dataset), str(more))


def test_a_setting_that_a_bad_disk_changed_is_refused(
    tmp_path: Path, dataset: Path, capsys
) -> None:
    """`merge` took it, and wrote another dataset without a word."""
    rerun(tmp_path, dataset)
    path = tmp_path / "run/run.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"rank": 2', b'"rank": 1'))
    assert main(["merge", str(tmp_path / "run")]) == 1
    assert "run.json is not what was written" in capsys.readouterr().err
    path.write_bytes(whole)
    assert main(["merge", str(tmp_path / "run")]) == 0


def test_a_removal_that_was_interrupted_is_no_obstacle(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finished it, was told that the file had changed, and the command ended."""
    rerun(tmp_path, dataset)
    shrill = {"pipeline_options": {"echo_tone": "shrill"}, "overwrite": True}
    rename, failures = os.rename, [OSError(errno.EIO, "Input/output error")]

    def failing(source, target):
        if failures and "rewards" in str(target):
            raise failures.pop()
        return rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        rerun(tmp_path, dataset, **shrill)
    assert rerun(tmp_path, dataset, **shrill).exit_status == 0
    assert not failures
