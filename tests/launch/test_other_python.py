"""The reward stage under another interpreter: a second real virtual environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from stream_engine import __version__
from stream_engine.cli.main import main
from stream_engine.errors import ConfigError
from stream_engine.run_dir.results import read_header
from stream_engine.work.other_python import find_python
from tests.conftest import DEMO_FLAGS, ROOT, answers, parts
from tests.processes import run_rank

OTHER = "msgspec==0.20.0"  # the tests' own environment has a later one


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with another msgspec; the rest it borrows from this one by a .pth file."""
    folder = tmp_path_factory.mktemp("other") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), OTHER],
        check=True,
        capture_output=True,
    )
    borrowed = [str(ROOT), str(ROOT / "kernels"), sysconfig.get_paths()["purelib"]]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


def test_rewards_are_made_by_the_other_interpreter(
    other_python: Path, demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    probe = "import msgspec; print(msgspec.__version__)"
    versions = {
        subprocess.run([python, "-c", probe], capture_output=True, text=True).stdout
        for python in (sys.executable, str(other_python))
    }
    assert len(versions) == 2
    words = ["run", *DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", tmp_path / "run"]
    words += ["--reward_model_python_path", other_python]
    assert run_rank(words, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()

    def pythons(stage: str) -> set[str]:
        results = (tmp_path / "run/results" / stage).glob("*.msgpack")
        return {read_header(path).created_by["python"] for path in results}

    assert pythons("rollouts") == {sys.prefix}
    assert pythons("rewards") == {str(other_python.parent.parent)}
    assert answers(tmp_path / "run") == answers(demo_run)
    assert parts(tmp_path / "run/dataset") == parts(demo_run / "dataset")


def test_a_strangers_package_of_that_name_is_refused_before_any_work(
    tmp_path: Path, demo_questions: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """`stream-engine` on the package index is another package, even of the same version number."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)  # an interpreter looks there, too
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    stranger = tmp_path / "env/lib" / version / "site-packages/stream_engine"
    stranger.mkdir()
    (stranger / "__init__.py").write_text(f"__version__ = {__version__!r}\n")
    words = ["run", "--demo", "--dataset_path", str(demo_questions)]
    words += ["--work_dir", str(tmp_path / "run"), "--reward_model_python_path"]
    assert main([*words, str(tmp_path / "env/bin/python")]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert str(stranger) in line and "install stream-engine-dpo==" in line
    assert not (tmp_path / "run/shards").exists()


def test_an_interpreter_without_a_dependency_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)  # an interpreter looks there, too
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "env/lib" / version / "site-packages"
    (site / "ours.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n")
    with pytest.raises(ConfigError, match=r"No module named '\w+'.*with its dependencies"):
        find_python(str(tmp_path / "env/bin/python"))


def test_this_interpreter_needs_no_second_process() -> None:
    assert find_python(sys.executable) is None
    assert find_python(None) is None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        pytest.param("/no/such/python", "does not exist", id="missing-path"),
        pytest.param("no_such_environment", "conda", id="no-such-conda-environment"),
        pytest.param("/bin/sh", "is no python", id="no-python"),
    ],
)
def test_a_wrong_path_is_one_line_before_any_work(
    setting: str, says: str, demo_questions: Path, tmp_path: Path, capsys
) -> None:
    with pytest.raises(ConfigError, match=says):
        find_python(setting)
    words = ["run", "--demo", "--dataset_path", str(demo_questions)]
    words += ["--work_dir", str(tmp_path / "run"), "--reward_model_python_path", setting]
    assert main(words) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run/shards").exists()
