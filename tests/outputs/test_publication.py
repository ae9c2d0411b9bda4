"""A dataset comes to stand in its folder whole, and a folder of others is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.outputs.publication import Publication
from stream_engine.outputs.validate import validate
from stream_engine.pairs.merger import export
from stream_engine.run_dir.paths import RunDir
from stream_engine.store.local import temporary_path
from tests.conftest import rows_file
from tests.synthetic import (
    FINGERPRINTS,
    SyntheticPipeline,
    run_merge,
    synthetic_sample,
    write_example_run,
    write_run,
)


class Ended(Exception):
    """Stands for a kill."""


@pytest.fixture
def finished(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, [synthetic_sample(i) for i in range(8)])
    return run_dir


def export_to(run_dir: RunDir, format: str) -> Path:
    config = RunConfig()
    return Path(
        export(run_dir, config, SyntheticPipeline(config), FINGERPRINTS, format=format).dataset
    )


@pytest.mark.parametrize("format", ["rlaifv", "trl", "llama_factory", "ms_swift_jsonl"])
def test_a_first_publication_that_ended_at_any_file_is_made_again(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The folder held rows and no record, and was refused as somebody else's for ever."""
    num_ended = 0
    for step in range(1, 100):
        calls = 0

        def ending(function, step=step):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == step:
                    raise Ended
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("link", "replace"):
                patch.setattr(os, name, ending(getattr(os, name)))
            try:
                folder = export_to(finished, format)
                break
            except Ended:
                num_ended += 1
        folder = export_to(finished, format)
        assert validate(folder) == []
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    assert num_ended >= 3 and rows_file(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["dataset_info.json"],
        ["images/cat.png"],
        ["train-00000-of-00001.parquet"],
        ["train-00000-of-00001-0123abcd.parquet", "notes.txt"],
        ["images/0123456789abcdef0123456789abcdef.0.png", "dataset_info.json"],
    ],
)
def test_a_folder_of_others_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        path = tmp_path / "dataset" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="holds other files"):
        Publication(tmp_path / "dataset")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_another_format_takes_the_files_of_the_one_before_away_and_no_others(
    tmp_path: Path,
) -> None:
    """Pictures of JSON lines stayed beside parquet, and files that somebody put there went."""
    run_dir, plain = write_example_run(tmp_path / "run"), write_example_run(tmp_path / "plain")
    folder = run_dir.dataset_dir
    run_merge(run_dir, format=("llama_factory_jsonl",))
    assert any(name.startswith("images/") for name in files_in(folder))
    mine = {"notes.txt", "assets/mine.png", "images/mine.png", "images/0123.png"}
    for name in mine:
        (folder / name).write_text("mine")
    for format in ("trl", "ms_swift_jsonl", "rlaifv"):
        run_merge(run_dir, format=(format,))
        run_merge(plain, format=(format,))
        assert files_in(folder) == files_in(plain.dataset_dir) | mine
    assert not (plain.dataset_dir / "images").exists()


def test_pictures_that_a_publication_could_not_remove_go_with_the_next_look(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_merge(finished, format=("ms_swift_jsonl",))
    images = finished.dataset_dir / "images"
    for path in images.iterdir():
        os.utime(path, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Publication, "remove_others", lambda *_: (_ for _ in ()).throw(Ended))
        with pytest.raises(Ended):
            run_merge(finished, format=("trl",))
    assert images.exists()
    (told,) = validate(images.parent)
    assert f" and {len(list(images.iterdir()))} more files: are of another publication" in told
    run_merge(finished, format=("trl",))
    assert not images.exists() and validate(finished.dataset_dir) == []


def test_rows_that_a_publication_could_not_remove_go_with_the_next_look(finished: RunDir) -> None:
    """They lay beside the dataset until its pairs changed."""
    folder = export_to(finished, "llama_factory")
    rows = rows_file(folder)
    old = folder / "train-0123abcd/train-00000-of-00001.parquet"
    old.parent.mkdir()
    old.write_bytes(b"old")
    os.utime(old, (1, 1))
    later = old.parent.with_name("train-89ef4567") / old.name  # of a publication that goes on
    later.parent.mkdir()
    later.write_bytes(b"new")
    os.utime(later, (2**31, 2**31))
    (told,) = validate(folder)
    assert "train-0123abcd" in told and "1 more files: are of another publication" in told
    export_to(finished, "llama_factory")
    assert not old.parent.exists() and later.exists() and rows.exists()
    (told,) = validate(folder)
    assert told.startswith(f"{later}: is of another publication, which goes on or was ended")


def test_a_scratch_folder_of_a_process_that_is_gone_goes_with_the_next_look(
    finished: RunDir,
) -> None:
    """It held a whole dataset, and stayed until another was written."""
    export_to(finished, "trl")
    words = [sys.executable, "-c", "import os; print(os.getpid())"]
    pid = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    scratch = temporary_path(finished.export_dir("trl"))
    left = scratch.with_name(scratch.name.replace(f"-{os.getpid()}-", f"-{pid}-"))
    for path in (scratch, left):
        path.mkdir()
    export_to(finished, "trl")
    assert scratch.exists() and not left.exists()


def test_an_old_card_of_the_same_size_is_a_publication_that_did_not_end(finished: RunDir) -> None:
    """The record stands before the card does: a kill between them left the card of before."""
    folder = export_to(finished, "trl")
    card = folder / "README.md"
    whole = card.read_bytes()
    card.write_bytes(whole.replace(b"license: unknown", b"license: unknowm", 1))
    record = (folder / "stats.json").stat().st_mtime
    os.utime(card, (record - 60, record - 60))
    assert card.read_bytes() != whole and len(card.read_bytes()) == len(whole)
    export_to(finished, "trl")
    assert card.read_bytes() == whole
