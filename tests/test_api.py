"""The package from Python: every command as a function, on a real run."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stream_engine import api
from stream_engine.errors import ConfigError
from tests.conftest import write_questions
from tests.echo_pipeline import echo_config


def test_a_run_is_made_looked_at_and_written_again(echo: None, tmp_path: Path) -> None:
    dataset = write_questions(tmp_path / "q.jsonl", ["what is this for", "where is it now"])
    config = echo_config(tmp_path / "w", dataset, format=("trl",))
    work_dir = tmp_path / "w"
    assert api.run(config, show_progress=False).exit_status == 0
    more = write_questions(tmp_path / "more.jsonl", ["what else is there"], first_id=50)
    api.rank(work_dir)
    added = api.append(work_dir, [str(more)], show_progress=False)
    assert added.samples_added_here == 1
    (note,) = added.notes
    assert note.startswith(f"{work_dir / 'dataset_ranked'} is from before the last merge: `stream-")
    api.rank(work_dir)
    with pytest.raises(ConfigError, match="dataset_path is a list"):
        api.append(work_dir, str(more))
    found = api.status(work_dir)
    assert found.samples.done == 3 and found.is_finished
    assert api.validate(work_dir) == []
    written = api.export(work_dir, "ms_swift", folder=tmp_path / "out", test_fraction=0.5)
    assert written.written == found.pairs.written
    in_run, exported = list(api.pairs(work_dir)), list(api.pairs(tmp_path / "out"))
    assert len(in_run) == len(exported) == found.pairs.written > 0
    assert {pair.question for pair in in_run} == {pair.question for pair in exported}
    assert Image.open(io.BytesIO(in_run[0].images[0].data)).size[0] > 0
    assert (in_run[0].margin or 0) > 0
    assert {pair.split for pair in exported} <= {"train", "test"}
    assert api.run(config, show_progress=False).notes == []
    assert api.report(work_dir, out=tmp_path / "page").is_file()
    with pytest.raises(ConfigError, match="dataset of format trl, not ms_swift; name a new"):
        api.export(work_dir, "ms_swift", folder=work_dir / "dataset")
    shutil.copytree(work_dir, tmp_path / "copy")
    with pytest.raises(ConfigError, match="is the dataset of another run"):
        api.export(work_dir, "trl", folder=tmp_path / "copy/dataset")
    assert api.export(work_dir, "trl", folder=work_dir / "dataset").written == written.written


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dataset_path": "questions.parquet"}, "dataset_path is a list: write"),
        ({"format": "trl"}, "format is a list: write"),
        ({"sample_k": "10"}, "sample_k"),
        ({"dtype": "float8"}, "dtype"),
        ({"rank": 9}, "rank 9 needs at least 18 answers"),
        ({"debug": 1}, "debug"),
    ],
)
def test_settings_are_checked_where_they_are_given(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        api.RunConfig(**settings)  # type: ignore[arg-type]


def test_lists_and_paths_are_taken_as_a_notebook_has_them(tmp_path: Path) -> None:
    config = api.RunConfig(dataset_path=[tmp_path / "a"], work_dir=tmp_path)  # type: ignore[arg-type, list-item]
    assert (config.dataset_path, config.work_dir) == ((f"{tmp_path}/a",), str(tmp_path))


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        api.status(tmp_path)
    with pytest.raises(ConfigError, match="holds no run and no dataset"):
        api.validate(tmp_path)
    with pytest.raises(ConfigError, match="holds no dataset"):
        next(api.pairs(tmp_path))


def test_the_functions_import_no_torch() -> None:
    program = "import sys; from stream_engine import api; print('torch' in sys.modules)"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
