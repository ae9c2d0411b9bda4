"""The report's folder: when it is made, what it takes over, and that a wheel has its parts."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.errors import ConfigError
from stream_engine.report.site import is_current, write_report
from stream_engine.run_dir.paths import RunDir
from tests.conftest import ROOT, file_states
from tests.report.runs import merged_run, reported
from tests.report.watched import entries_of, index_of
from tests.synthetic import SyntheticPipeline, run_merge, write_example_run

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]


def test_a_run_writes_its_report_and_leaves_a_current_one_alone(
    demo_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_current(RunDir(demo_run))
    before = file_states(demo_run / "report")
    assert main(["merge", str(demo_run)]) == 0
    assert f"report:  {demo_run}/report/index.html" in capsys.readouterr().out
    assert file_states(demo_run / "report") == before


def test_the_command_writes_where_it_is_told(
    demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["report", str(demo_run), "--out", str(out), "--rows", "3"]) == 0
    assert f"report: {out}/index.html (" in capsys.readouterr().out
    kept = [line for line in index_of(out) if line["fate"] == "kept"]
    assert 3 <= len(kept) <= 3 + 40
    assert {line["id"] for line in index_of(out)} == entries_of(out).keys()


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    run = merged_run(tmp_path / "run", 12)
    for name in ("a", "b"):
        write_report(run, tmp_path / name, num_rows=5)
    first, second = (file_states(tmp_path / name) for name in ("a", "b"))
    assert {n: data for n, (data, _) in first.items()} == {n: d for n, (d, _) in second.items()}


def test_pictures_are_made_once(tmp_path: Path) -> None:
    """A second report links the first one's: the same files, not only the same bytes."""
    run = merged_run(tmp_path / "run", 12)
    write_report(run, num_rows=1000)
    folder = tmp_path / "run/report/pictures"
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    write_report(run, num_rows=1000)
    assert len(before) == 24
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before


def test_a_new_dataset_makes_the_report_stale(tmp_path: Path) -> None:
    run = merged_run(tmp_path / "run", 12)
    write_report(run, num_rows=5)
    assert is_current(run.run_dir)
    run_merge(run.run_dir, max_pairs_per_sample=1)
    assert not is_current(run.run_dir)


def test_samples_that_were_set_aside_are_shown_with_their_pictures(tmp_path: Path) -> None:
    run_dir = write_example_run(tmp_path / "run")
    run_merge(run_dir)
    write_report(reported(run_dir), num_rows=5)
    report = run_dir.report_html.parent
    aside = [e for e in entries_of(report).values() if e["fate"].endswith(": synthetic")]
    assert {(e["idx"], e["fate"]) for e in aside} == {
        ("idx-3", "rollouts: synthetic"),
        ("idx-12", "rewards: synthetic"),
    }
    assert all((report / e["pictures"][0]["file"]).is_file() for e in aside)


def test_a_run_without_any_pair_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SyntheticPipeline, "candidate_pairs", lambda self, sample, rewards: [])
    run = merged_run(tmp_path / "run", 3)
    made = write_report(run)
    assert (made.num_pairs, made.num_shown) == (0, 0)
    assert {line["fate"] for line in index_of(tmp_path / "run/report")} == {"no_match"}
    assert "Nothing vanished" in (tmp_path / "run/report/index.html").read_text()


def test_a_report_goes_to_a_disk_alone(
    demo_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--out s3://bucket/report` was written to a local folder that was called `s3:`."""
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(demo_run), "--out", "s3://bucket/report"]) == 1
    assert "s3://bucket/report: a report is looked at from a disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    run = merged_run(tmp_path / "run", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        write_report(run, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.fixture
def own_run(demo_run: Path, tmp_path: Path) -> Path:
    """A copy of the demo run whose report was lost."""
    shutil.copytree(demo_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/report")
    return tmp_path / "run"


def test_a_report_that_was_lost_or_never_made_is_made_by_the_next_run(own_run: Path) -> None:
    assert main(["merge", str(own_run), "--report", "never"]) == 0
    assert not (own_run / "report").exists()
    assert main(["merge", str(own_run), "--report", "auto"]) == 0
    assert is_current(RunDir(own_run))


def test_a_report_that_cannot_be_made_is_no_failure_of_the_run(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_run / "report").mkdir()
    (own_run / "report/thesis.txt").write_text("mine")
    assert main(["merge", str(own_run)]) == 0
    said = capsys.readouterr()
    assert "report:" not in said.out and "dataset:" in said.out
    assert (
        "no report: "
        in said.err
        + said.out
        + (own_run / "logs")
        .joinpath(next(path.name for path in (own_run / "logs").iterdir()))
        .read_text()
    )
    assert os.listdir(own_run / "report") == ["thesis.txt"]


def test_a_wheel_has_every_template_style_and_script() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["stream_engine"]
    package = ROOT / "stream_engine"
    parts = [
        str(path.relative_to(package))
        for folder in ("static", "templates")
        for path in (package / "report" / folder).iterdir()
    ]
    assert len(parts) >= 7
    left_out = [
        part for part in parts if not any(fnmatch.fnmatch(part, pattern) for pattern in patterns)
    ]
    assert left_out == []
