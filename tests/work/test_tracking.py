"""Each tracker's real package, on this machine's disk, is told of a run; without one nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stream_engine.errors import ConfigError
from stream_engine.run_dir.paths import RunDir
from stream_engine.work import tracking
from stream_engine.work.progress import Progress, ProgressView
from stream_engine.work.runner import run
from tests.conftest import write_questions
from tests.echo_pipeline import echo_config


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "INTERVAL_S", 0.0)


def tracked_run(tmp_path: Path, tracker: str | None) -> RunDir:
    dataset = write_questions(tmp_path / "q.jsonl", ["what is <b>this</b> for", "where is it"])
    config = echo_config(tmp_path / "tracked", dataset, track=tracker)
    assert run(config, show_progress=False).exit_status == 0
    return RunDir(tmp_path / "tracked")


def test_tensorboard_is_told(echo: None, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tracked_run(tmp_path, "tensorboard")
    events = EventAccumulator(str(run_dir.logs_dir / "tensorboard"))
    events.Reload()
    names = events.Tags()
    told = {"progress/questions_total", "pairs/written", "drops/max_pairs_per_sample"}
    assert told <= set(names["scalars"])
    assert events.Scalars("pairs/written")[0].value > 0
    assert "pairs/0" in names["images"]
    text = events.Tensors("pairs/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "&lt;b>this" in text and "<b>" not in text


def test_trackio_is_told(echo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    tracked_run(tmp_path, "trackio")
    rows = SQLiteStorage.get_logs(tracking.PROJECT, "tracked")
    named: dict[str, Any] = {name: value for row in rows for name, value in row.items()}
    assert named["pairs/written"] > 0
    assert "pairs" in named


def test_wandb_is_told(echo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb")
    run_dir = tracked_run(tmp_path, "wandb")
    (folder,) = (run_dir.logs_dir / "wandb").glob("offline-run-*")
    (stored,) = folder.glob("*.wandb")
    assert b"pairs/written" in stored.read_bytes()
    assert list(folder.glob("files/media/table/pairs*.json"))


def test_a_tracker_that_fails_is_left_alone(
    echo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(tracking.Backend):
        told = 0

        def __init__(self, *args: object) -> None:
            pass

        def log(self, values: object, step: int) -> None:
            type(self).told += 1
            raise ConnectionError("away")

        def table(self, pairs: object) -> None:
            raise AssertionError

        finish = table  # type: ignore[assignment]

    monkeypatch.setitem(tracking.BACKENDS, "wandb", Failing)
    tracked_run(tmp_path, "wandb")
    assert Failing.told == 1


def test_a_tracker_that_is_not_installed_is_named(
    echo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object) -> None:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setitem(tracking.BACKENDS, "wandb", missing)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pip install wandb"):
        tracked_run(tmp_path, "wandb")


def test_nothing_is_tracked_unless_asked_for(
    echo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "BACKENDS", {})
    tracked_run(tmp_path, None)


def test_a_silent_view_still_tells_its_listener() -> None:
    heard: list[Progress] = []
    with ProgressView(silent=True, listener=heard.append) as view:
        view.update(Progress(doing="sampling answers"))
    assert len(heard) == 1
