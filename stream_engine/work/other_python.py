"""--reward_model_python_path: the reward stage under another interpreter.

Some reward models want other versions of some packages. The worker then does the rollouts itself,
starts `python -m stream_engine work WORK_DIR --run_stage 1` with the other interpreter as the same
rank, waits for it, and merges. The two meet in the run directory and nowhere else.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from stream_engine import DISTRIBUTION, __version__
from stream_engine.errors import ConfigError, StreamEngineError

logger = logging.getLogger(__name__)

PROBE = """
import json, sys
found = {"prefix": sys.prefix, "version": None, "file": None, "error": None}
try:
    import stream_engine
    found["file"] = stream_engine.__file__
    found["version"] = stream_engine.__version__
    import stream_engine.cli.main, stream_engine.work.runner
    import stream_engine.engine, stream_kernels
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
"""Says which stream_engine an interpreter has, and whether it can be used with what it needs."""
PROBE_TIMEOUT_S = 300


class Probed(msgspec.Struct, frozen=True):
    """The answer of PROBE."""

    prefix: str
    version: str | None
    file: str | None
    error: str | None


def find_python(setting: str | None) -> Path | None:
    """The interpreter that `reward_model_python_path` means; None when it is this very one.

    A path to an interpreter, a folder of an environment, or a conda environment's name.

    Raises:
        ConfigError: when there is none, or this version of this package cannot be used there.
    """
    if not setting:
        return None
    python = _resolve(setting)
    try:
        probe = subprocess.run(
            [str(python), "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"reward_model_python_path {setting}: cannot run it: {error}") from error
    try:
        found = msgspec.json.decode(probe.stdout.strip().splitlines()[-1], type=Probed)
    except (IndexError, msgspec.DecodeError) as error:
        said = (probe.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ConfigError(f"reward_model_python_path {python} is no python ({said})") from error
    if problem := unusable(found):
        raise ConfigError(f"reward_model_python_path {python} {problem}")
    return None if Path(found.prefix) == Path(sys.prefix) else python


def unusable(found: Probed) -> str | None:
    """What keeps an interpreter from doing the reward stage, and what to do about it."""
    install = f"install {DISTRIBUTION}=={__version__} or this checkout there with its dependencies"
    if found.file is None or found.error is not None:
        where = f" (stream_engine is at {found.file})" if found.file else ""
        return f"cannot import stream_engine: {found.error}{where}; {install}"
    if found.version != __version__:
        return f"has stream_engine {found.version}, this is {__version__}; {install}"
    return None


def _resolve(setting: str) -> Path:
    path = Path(setting).expanduser()
    for candidate in (path, path / "bin" / "python"):
        if candidate.is_file():
            return candidate.absolute()  # not resolved: a venv's python is a link
    if path.name != setting:
        raise ConfigError(f"reward_model_python_path {setting} does not exist")
    conda = shutil.which("conda")
    if conda is None:
        raise ConfigError(
            f"reward_model_python_path {setting!r} is no file, and there is no conda to ask for an "
            "environment of that name; give the path of a python"
        )
    command = [conda, "run", "-n", setting, "python", "-c", "import sys; print(sys.executable)"]
    answer = subprocess.run(command, capture_output=True, text=True)
    found = Path(answer.stdout.strip() or ".")
    if answer.returncode or not found.is_file():
        raise ConfigError(f"conda knows no environment {setting!r}; `conda env list` shows them")
    return found


def run_rewards_under(python: Path, work_dir: str) -> None:
    """Do the reward stage of a run with another interpreter, as the same rank, and wait for it.

    Raises:
        StreamEngineError: when it ends with an error of its own (which it has printed).
    """
    command = [str(python), "-m", "stream_engine", "work", work_dir, "--run_stage", "1"]
    logger.info("rewards under %s", python)
    child = subprocess.Popen(command)
    try:
        status = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if status not in (0, 2):
        raise StreamEngineError(f"the reward stage under {python} ended with status {status}")
